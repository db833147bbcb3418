"""Submit a job to a cluster, again when its head or its driver dies, until it ends well or a limit is reached.

Ray runs a job once, and forgets it with the head of its cluster. Shoal's jobs resume, so it is enough to submit the same command
again. It is not submitted again after a wrong command (exit 2), after quarantined shards (exit 3), and after an error that
comes back (exit 1).
"""

import logging
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..cli.options import option
from ..errors import EXIT_ERROR, EXIT_QUARANTINED, EXIT_USAGE, RunError, UsageError
from ..storage.fingerprint import fingerprint

log = logging.getLogger("shoal")

ANSWER_SECONDS = 30.0  # of a request: a head that lost its network never answers
UPLOAD_SECONDS = 600.0  # of the tree, perhaps through a tunnel
REFUSED_SECONDS = 120.0  # a head that has just started refuses jobs for some seconds
POLL_SECONDS = 2.0
LOG_BYTES_A_SECOND = 50_000  # Ray sends the whole log each time, so long logs are read less often
MAX_ERRORS = 3  # in a row, quick or with the same last line
MAX_FAILURES = 30  # of jobs whose cluster lived
LONG_SECONDS = 600.0  # of a driver that did some work before its error
QUICK_SECONDS = 30.0  # of a driver that did none
PAUSE_SECONDS = 30.0  # after an error or a quick end: nodes come back a minute after their head
LOST = "lost"  # status of a job that its cluster does not know any more
OVER = ("SUCCEEDED", "FAILED", "STOPPED", LOST)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Options of `jobs/submit_job.py`."""

    address: str = option("Of the head's job server, as `ray job submit` takes it.", "http://127.0.0.1:8265")
    working_dir: str = option("The tree that runs: a folder, without what .gitignore names, or a zip at a URL.", ".")
    env: tuple[str, ...] = option("Variable of the job, as KEY=VALUE. Repeat it for more.", (), many=True)
    hours: float = option("Give up after so long. The same command goes on later.", 24.0)
    command: tuple[str, ...] = option("The job, after --.", rest=True)


class JobClient(Protocol):
    """The part of ray.job_submission.JobSubmissionClient that is used here."""

    def list_jobs(self) -> Sequence[Any]: ...

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str: ...

    def get_job_logs(self, job_id: str) -> str: ...


def ray_client(address: str) -> JobClient:
    """Ray's own client. Raises ConnectionError where no job server answers."""
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


@dataclass(frozen=True)
class End:
    """The end of a job. status: of Ray, or LOST; code: the driver's exit code, if any; last_line: of its message."""

    status: str
    code: int | None
    last_line: str
    seconds: float

    @property
    def final(self) -> int | None:
        """The exit code, where a new submission would end with the same."""
        if self.status == "SUCCEEDED":
            return 0
        return self.code if self.code in (EXIT_USAGE, EXIT_QUARANTINED) else None

    def __str__(self) -> str:
        how = f"ended with exit code {self.code}" if self.code is not None else f"is {self.status.lower()}"
        return f"{how} after {self.seconds:.0f} s: {self.last_line}"


def submit_until_done(
    config: SubmitConfig, show: Callable[[str], None], client: Callable[[str], JobClient] = ray_client
) -> int:
    """Submit, follow, and submit again; the exit code of the job. show: receives the output of the job.

    Raises UsageError for a wrong command, RunError when the cluster refuses the job, when it was stopped, fails again and again,
    or is not done in time.
    """
    variables = _variables(config.env)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers them to --address
        os.environ.pop(name, None)
    jobs, errors, failures, last_line = _Jobs(config, variables, show, client), 0, 0, ""
    while True:
        name = jobs.running() or jobs.submit()
        end = jobs.follow(name)
        if end.final is not None:
            return end.final
        if end.status == "STOPPED":
            raise RunError(f"{name} was stopped by someone. Start the same command again to go on")
        failures += end.status != LOST
        again = end.seconds < LONG_SECONDS or end.last_line == last_line
        errors = 0 if end.code != EXIT_ERROR else errors + 1 if again else 1
        last_line = end.last_line
        if errors == MAX_ERRORS or failures == MAX_FAILURES:
            raise RunError(f"{name}, like others before it, {end}. Mend what it says, and start again")
        log.info(f"{name} {end}; submitting it again")
        if end.code == EXIT_ERROR or (end.seconds < QUICK_SECONDS and end.status != LOST):
            time.sleep(PAUSE_SECONDS * max(1, errors))


def _variables(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise UsageError(f"--env {word!r} is not KEY=VALUE, as in AWS_REGION=eu-central-1")
    return dict(word.split("=", 1) for word in words)


class _Jobs:
    """The submissions of one command to one cluster, which may go away and come back empty."""

    def __init__(
        self,
        config: SubmitConfig,
        variables: dict[str, str],
        show: Callable[[str], None],
        client: Callable[[str], JobClient],
    ):
        self.config, self.variables, self.show, self.client = config, variables, show, client
        self.until = time.monotonic() + 3600 * config.hours
        self.entrypoint = shlex.join(config.command)
        key = fingerprint(self.entrypoint, config.working_dir, sorted(variables.items()), digits=10)
        self.prefix = f"shoal-{key}-"
        self.answered = False

    def running(self) -> str | None:
        """The name of a submission of the same command that runs or waits already."""
        known = self.call(self._known)
        name = next((name for name, status in known.items() if status not in OVER), None)
        if name:
            log.info(f"following {name}, which is {known[name].lower()}")
        return name

    def submit(self) -> str:
        """Submit once more. A submission that arrived though its answer was lost is not repeated."""
        number = 1 + max((int(name.removeprefix(self.prefix)) for name in self.call(self._known)), default=0)
        name = f"{self.prefix}{number:04d}"
        environment = {"working_dir": self.config.working_dir, "env_vars": self.variables}

        def submit_once(client: JobClient) -> None:
            if name not in self._known(client):
                client.submit_job(entrypoint=self.entrypoint, submission_id=name, runtime_env=environment)

        self.call(submit_once, UPLOAD_SECONDS)
        log.info(f"submitted {name}")
        return name

    def follow(self, name: str) -> End:
        """Show the log of a job until it ends, or until its cluster does not know it any more."""
        began = read = time.monotonic()
        shown = 0
        while True:
            details = self.call(lambda client: _details(client, name))
            over = details is None or str(details.status.value) in OVER
            if over or time.monotonic() - read > shown / LOG_BYTES_A_SECOND:
                shown, read = self._show_log(name, shown), time.monotonic()
            if details is None:
                return End(LOST, None, "its cluster does not know it", time.monotonic() - began)
            if over:
                return _end(details)
            time.sleep(POLL_SECONDS)

    def call(self, request: Callable[[JobClient], T], seconds: float = ANSWER_SECONDS) -> T:
        """The answer of the cluster; waits while the cluster is away.

        Raises RunError when time is up, when the cluster has never answered, or when it refuses for good.
        """
        away, refused = False, 0.0  # the time of the first refusal
        while time.monotonic() < self.until:
            try:
                answer = _with_timeout(seconds, lambda: request(self.client(self.config.address)))
            except (OSError, TimeoutError) as error:  # ConnectionError among them
                self._check_known(error)
                if not away:
                    log.info(f"{self.config.address} does not answer ({type(error).__name__}): waiting for it")
                away = True
            except Exception as error:  # a RuntimeError comes from the server, which may still be starting
                refused = refused or time.monotonic()
                if time.monotonic() - refused > REFUSED_SECONDS or not isinstance(error, RuntimeError):
                    raise RunError(f"{self.config.address} does not take the job: {error}") from error
            else:
                if away:
                    log.info(f"{self.config.address} is back")
                self.answered = True
                return answer
            time.sleep(POLL_SECONDS)
        raise RunError(f"not done in {self.config.hours:g} hours. Start the same command again to go on")

    def _check_known(self, error: Exception) -> None:
        """Raises RunError for an address that has never answered."""
        if not self.answered and isinstance(error, ConnectionError):
            raise RunError(
                f"no Ray job server answers at {self.config.address}: {error}. Start the cluster, or its tunnel "
                "(ray dashboard cluster/aws.yaml), or correct --address"
            ) from error

    def _show_log(self, name: str, shown: int) -> int:
        """Show the rest of the log; returns the length shown. Without an answer nothing is shown this time."""
        with suppress(Exception):
            output = _with_timeout(ANSWER_SECONDS, lambda: self.client(self.config.address).get_job_logs(name))
            self.show(output[shown:])
            return max(shown, len(output))
        return shown

    def _known(self, client: JobClient) -> dict[str, str]:
        jobs = {job.submission_id: str(job.status.value) for job in client.list_jobs() if job.submission_id}
        return {name: status for name, status in jobs.items() if name.startswith(self.prefix)}


def _details(client: JobClient, name: str) -> Any:
    """Ray's details of a job; None where the cluster does not know it."""
    return next((job for job in client.list_jobs() if job.submission_id == name), None)


def _end(details: Any) -> End:
    seconds = max(0, (details.end_time or 0) - (details.start_time or 0)) / 1000
    lines = (details.message or "").strip().splitlines() or ["no message"]
    return End(str(details.status.value), details.driver_exit_code, lines[-1][-300:], seconds)


def _with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`. Raises its exception, or TimeoutError when it takes too long; its thread then goes on, unused."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)

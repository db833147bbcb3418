"""Submit a job to a cluster, again when its head or its driver dies, until it ends well or a limit is reached.

Ray runs a job once, and forgets it with the head of its cluster. Shoal's jobs resume, so it is enough to submit the same command
again: but not after a wrong command (exit 2), quarantined shards (exit 3), or an error that comes back (exit 1).
"""

import logging
import os
import shlex
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class End:
    """The end of a job. status: of Ray, or LOST; code: the driver's exit code, if any; last_line: of its message."""

    status: str
    code: int | None
    last_line: str
    seconds: float

    def __str__(self) -> str:
        how = f"ended with exit code {self.code}" if self.code is not None else f"is {self.status.lower()}"
        return f"{how} after {self.seconds:.0f} s: {self.last_line}"


def submit_until_done(
    config: SubmitConfig, show: Callable[[str], None], client: Callable[[str], Any] | None = None
) -> int:
    """Submit, follow, and submit again; the exit code of the job. show: receives its output. client: of an address, Ray's by default.

    Raises UsageError for a wrong command, RunError when the cluster refuses the job, when it was stopped, fails again and again,
    or is not done in time.
    """
    from ray.job_submission import JobSubmissionClient

    jobs, errors, failures, last_line = _Jobs(config, show, client or JobSubmissionClient), 0, 0, ""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers them to --address
        os.environ.pop(name, None)
    while True:
        name = jobs.submit()
        end = jobs.follow(name)
        if end.status == "SUCCEEDED":
            return 0
        if end.code in (EXIT_USAGE, EXIT_QUARANTINED):
            return end.code
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


class _Jobs:
    """The submissions of one command to one cluster, which may go away and come back empty."""

    def __init__(self, config: SubmitConfig, show: Callable[[str], None], client: Callable[[str], Any]):
        for word in config.env:
            if "=" not in word:
                raise UsageError(f"--env {word!r} is not KEY=VALUE, as in AWS_REGION=eu-central-1")
        variables = dict(word.split("=", 1) for word in config.env)
        self.config, self.show, self.client = config, show, client
        self.until = time.monotonic() + 3600 * config.hours
        self.entrypoint = shlex.join(config.command)
        self.environment = {"working_dir": config.working_dir, "env_vars": variables}
        key = fingerprint(self.entrypoint, config.working_dir, sorted(variables.items()), digits=10)
        self.prefix = f"shoal-{key}-"
        self.answered = False

    def submit(self) -> str:
        """The name of the command's submission that runs or waits already; else of a new one."""
        known = self.call(self._known)
        if running := next((name for name, status in known.items() if status not in OVER), None):
            log.info(f"following {running}, which is {known[running].lower()}")
            return running
        name = f"{self.prefix}{1 + max((int(name.removeprefix(self.prefix)) for name in known), default=0):04d}"

        def submit_once(client: Any) -> None:  # it may have arrived though its answer was lost
            if name not in self._known(client):
                client.submit_job(entrypoint=self.entrypoint, submission_id=name, runtime_env=self.environment)

        self.call(submit_once, UPLOAD_SECONDS)
        log.info(f"submitted {name}")
        return name

    def follow(self, name: str) -> End:
        """Show the log of a job until it ends, or until its cluster does not know it any more."""
        began = read = time.monotonic()
        shown = 0
        while True:
            jobs = self.call(lambda client: client.list_jobs())
            details = next((job for job in jobs if job.submission_id == name), None)
            status = LOST if details is None else str(details.status.value)
            if status in OVER or time.monotonic() - read > shown / LOG_BYTES_A_SECOND:
                shown, read = self._show_log(name, shown), time.monotonic()
            if details is None:
                return End(LOST, None, "its cluster does not know it", time.monotonic() - began)
            if status in OVER:
                seconds = max(0, (details.end_time or 0) - (details.start_time or 0)) / 1000
                lines = (details.message or "").strip().splitlines() or ["no message"]
                return End(status, details.driver_exit_code, lines[-1][-300:], seconds)
            time.sleep(POLL_SECONDS)

    def call(self, request: Callable[[Any], T], seconds: float = ANSWER_SECONDS) -> T:
        """Wait for the cluster's answer. Raises RunError when time is up, when it never answered, or when it refuses for good."""
        address, away, refused = self.config.address, False, 0.0  # the time of the first refusal
        while time.monotonic() < self.until:
            try:
                answer = _with_timeout(seconds, lambda: request(self.client(address)))
            except OSError as error:  # ConnectionError and TimeoutError among them
                if isinstance(error, ConnectionError) and not self.answered:
                    raise RunError(
                        f"no Ray job server answers at {address}: {error}. Start the cluster, or its tunnel "
                        "(ray dashboard cluster/aws.yaml), or correct --address"
                    ) from error
                if not away:
                    log.info(f"{address} does not answer ({type(error).__name__}): waiting for it")
                away = True
            except Exception as error:  # a RuntimeError comes from the server, which may still be starting
                refused = refused or time.monotonic()
                if time.monotonic() - refused > REFUSED_SECONDS or not isinstance(error, RuntimeError):
                    raise RunError(f"{address} does not take the job: {error}") from error
            else:
                if away:
                    log.info(f"{address} is back")
                self.answered = True
                return answer
            time.sleep(POLL_SECONDS)
        raise RunError(f"not done in {self.config.hours:g} hours. Start the same command again to go on")

    def _show_log(self, name: str, shown: int) -> int:
        """Show the rest of the log; returns the length shown. Without an answer nothing is shown this time."""
        with suppress(Exception):
            output = _with_timeout(ANSWER_SECONDS, lambda: self.client(self.config.address).get_job_logs(name))
            self.show(output[shown:])
            return max(shown, len(output))
        return shown

    def _known(self, client: Any) -> dict[str, str]:
        """Statuses of this command's submissions, by name."""
        jobs = {job.submission_id or "": str(job.status.value) for job in client.list_jobs()}
        return {name: status for name, status in jobs.items() if name.startswith(self.prefix)}


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

"""Submit a job to a cluster and see it through: again when its head or its driver dies, until it ends well or a limit.

A job of Ray lives as long as its cluster's head and is run once; Shoal's jobs go on where they were stopped. So what is left
to do is to start the same command again, and to know when not to: after a wrong command (exit 2), after quarantined shards
(exit 3), and after errors that come again (exit 1).
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
from typing import Any, TypeVar

from ..cli.options import option
from ..errors import EXIT_ERROR, EXIT_QUARANTINED, EXIT_USAGE, RunError, UsageError
from ..storage.fingerprint import fingerprint

log = logging.getLogger("shoal")

ANSWER_SECONDS = 30.0  # a head that is cut off leaves a request without an answer, for ever
UPLOAD_SECONDS = 600.0  # for the tree, through a tunnel perhaps
REFUSED_SECONDS = 120.0  # a head that has just started refuses for some seconds what it takes later
POLL_SECONDS = 2.0
LOG_BYTES_A_SECOND = 50_000  # Ray gives the whole log each time: long ones are asked for less often
ERRORS = 3  # in a row, quick or with the same last words
TRIES = 30  # in all that ended badly while their cluster lived
LONG = 600.0  # seconds; a driver that ran as long was not started in vain
QUICK = 30.0  # seconds
PAUSE_SECONDS = 30.0  # after an error, or a quick end: nodes without a head come back a minute after it
LOST = "lost"  # the job of a cluster that is no more
OVER = ("SUCCEEDED", "FAILED", "STOPPED", LOST)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Everything `jobs/submit_job.py` can be told."""

    address: str = option("Of the head's job server, as `ray job submit` takes it.", "http://127.0.0.1:8265")
    working_dir: str = option("The tree that runs: a folder, without what .gitignore names, or a zip at a URL.", ".")
    env: tuple[str, ...] = option("Variable of the job, as KEY=VALUE. Repeat it for more.", (), many=True)
    hours: float = option("Give up after so long. The same command goes on later.", 24.0)
    command: tuple[str, ...] = option("The job, after --.", rest=True)


@dataclass(frozen=True)
class End:
    """How a try ended. status: of Ray, or LOST; code: the driver's exit code where it had one; words: the last it said."""

    status: str
    code: int | None
    words: str
    seconds: float

    @property
    def final(self) -> int | None:
        """The exit code that a new try would not change."""
        if self.status == "SUCCEEDED":
            return 0
        return self.code if self.code in (EXIT_USAGE, EXIT_QUARANTINED) else None

    def __str__(self) -> str:
        how = f"ended with exit code {self.code}" if self.code is not None else f"is {self.status.lower()}"
        return f"{how} after {self.seconds:.0f} s: {self.words}"


def see_through(config: SubmitConfig, show: Callable[[str], None]) -> int:
    """Submit, follow, and submit again; the exit code of the job. show: receives the output of the job.

    Raises UsageError for a wrong command, RunError when the cluster refuses the job, when it was stopped, fails again and again,
    or is not done in time.
    """
    variables = _variables(config.env)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would win over --address
        os.environ.pop(name, None)
    jobs, errors, bad, before = _Jobs(config, variables, show), 0, 0, ""
    while True:
        name = jobs.running() or jobs.submit()
        end = jobs.follow(name)
        if end.final is not None:
            return end.final
        if end.status == "STOPPED":
            raise RunError(f"{name} was stopped by someone. Start the same command again to go on")
        bad += end.status != LOST
        errors = 0 if end.code != EXIT_ERROR else errors + 1 if end.seconds < LONG or end.words == before else 1
        before = end.words
        if errors == ERRORS or bad == TRIES:
            raise RunError(f"{name}, like others before it, {end}. Mend what it says, and start again")
        log.info(f"{name} {end}; submitting it again")
        if end.code == EXIT_ERROR or (end.seconds < QUICK and end.status != LOST):
            time.sleep(PAUSE_SECONDS * max(1, errors))


def _variables(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise UsageError(f"--env {word!r} is not KEY=VALUE, as in AWS_REGION=eu-central-1")
    return dict(word.split("=", 1) for word in words)


class _Jobs:
    """The tries of one command on one cluster, which may go away and come back empty."""

    def __init__(self, config: SubmitConfig, variables: dict[str, str], show: Callable[[str], None]):
        self.config, self.variables, self.show = config, variables, show
        self.until = time.monotonic() + 3600 * config.hours
        self.entrypoint = shlex.join(config.command)
        key = fingerprint(self.entrypoint, config.working_dir, sorted(variables.items()), digits=10)
        self.prefix = f"shoal-{key}-"
        self.answered = False

    def running(self) -> str | None:
        """A try that runs or waits already: of this command before it was stopped, or of the same one elsewhere."""
        known = self.ask(self._known)
        name = next((name for name, status in known.items() if status not in OVER), None)
        if name:
            log.info(f"following {name}, which is {known[name].lower()}")
        return name

    def submit(self) -> str:
        """A new try. One whose answer was lost is found, not submitted twice."""
        number = 1 + max((int(name.removeprefix(self.prefix)) for name in self.ask(self._known)), default=0)
        name = f"{self.prefix}{number:04d}"
        environment = {"working_dir": self.config.working_dir, "env_vars": self.variables}

        def attempt(client: Any) -> None:
            if name not in self._known(client):
                client.submit_job(entrypoint=self.entrypoint, submission_id=name, runtime_env=environment)

        self.ask(attempt, UPLOAD_SECONDS)
        log.info(f"submitted {name}")
        return name

    def follow(self, name: str) -> End:
        """Show its log until it ends, or its cluster is found to have forgotten it."""
        began = read = time.monotonic()
        shown = 0
        while True:
            details = self.ask(lambda client: _details(client, name))
            over = details is None or str(details.status.value) in OVER
            if over or time.monotonic() - read > shown / LOG_BYTES_A_SECOND:
                shown, read = self._show_log(name, shown), time.monotonic()
            if details is None:
                return End(LOST, None, "its cluster does not know it", time.monotonic() - began)
            if over:
                return _end(details)
            time.sleep(POLL_SECONDS)

    def ask(self, question: Callable[[Any], T], seconds: float = ANSWER_SECONDS) -> T:
        """The answer of the cluster, waited for while it is away.

        Raises RunError when time is up, when it never was there, or refuses for good.
        """
        away, refused = False, 0.0  # when it was first
        while time.monotonic() < self.until:
            try:
                answer = _within(seconds, lambda: question(_client(self.config.address)))
            except (OSError, TimeoutError) as error:  # ConnectionError among them
                self._refuse_unknown(error)
                if not away:
                    log.info(f"{self.config.address} does not answer ({type(error).__name__}): waiting for it")
                away = True
            except Exception as error:  # a RuntimeError is the server's, which may change its mind
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

    def _refuse_unknown(self, error: Exception) -> None:
        if not self.answered and isinstance(error, ConnectionError):
            raise RunError(
                f"no Ray job server answers at {self.config.address}: {error}. Start the cluster, or its tunnel "
                "(ray dashboard cluster/aws.yaml), or correct --address"
            ) from error

    def _show_log(self, name: str, shown: int) -> int:
        """What of the log was not shown yet; how much of it is. A log that cannot be had is no reason to wait."""
        with suppress(Exception):
            output = _within(ANSWER_SECONDS, lambda: _client(self.config.address).get_job_logs(name))
            self.show(output[shown:])
            return max(shown, len(output))
        return shown

    def _known(self, client: Any) -> dict[str, str]:
        jobs = {job.submission_id: str(job.status.value) for job in client.list_jobs() if job.submission_id}
        return {name: status for name, status in jobs.items() if name.startswith(self.prefix)}


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def _details(client: Any, name: str) -> Any:
    """What the cluster knows of a job; None where it knows of none such."""
    return next((job for job in client.list_jobs() if job.submission_id == name), None)


def _end(details: Any) -> End:
    seconds = max(0, (details.end_time or 0) - (details.start_time or 0)) / 1000
    lines = (details.message or "").strip().splitlines() or ["no word"]
    return End(str(details.status.value), details.driver_exit_code, lines[-1][-300:], seconds)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError when it takes too long, whereupon its thread is left to itself."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)

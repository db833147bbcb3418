"""Submit a job to a cluster and see it through: again when its head or its driver dies, until it ends well or a limit.

A job of Ray lives as long as its cluster's head and is run once; Shoal's jobs go on where they were stopped. So what is left
to do is to start the same command again, and to know when not to: after a wrong command (exit 2), after quarantined shards
(exit 3), and after errors that come again (exit 1).
"""

import hashlib
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import EXIT_ERROR, EXIT_QUARANTINED, EXIT_USAGE, RunError, UsageError

ANSWER_SECONDS = 30.0  # a head that is cut off leaves a request without an answer, for ever
POLL_SECONDS = 2.0
LOG_BYTES_A_SECOND = 50_000  # Ray gives the whole log each time: long ones are asked for less often
ERRORS = 3  # in a row
ERROR_SECONDS = 30.0  # before the next try: nodes without a head come back a minute after it
LONG = 600.0  # seconds; a driver that ran as long was not started in vain
LOST = "lost"  # the job of a cluster that is no more
OVER = ("SUCCEEDED", "FAILED", "STOPPED", LOST)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Everything `jobs/submit_job.py` can be told."""

    address: str = field(
        default="http://127.0.0.1:8265", metadata={"help": "Of the head's job server, as `ray job submit` takes it."}
    )
    working_dir: str = field(
        default=".",
        metadata={"help": "The tree that runs: a folder, without what .gitignore names, or a zip at a URL."},
    )
    env: tuple[str, ...] = field(
        default=(), metadata={"help": "Variable of the job, as KEY=VALUE. Repeat it for more.", "many": True}
    )
    hours: float = field(default=24.0, metadata={"help": "Give up after so long. The same command goes on later."})
    command: tuple[str, ...] = field(metadata={"help": "The job, after --.", "rest": True})


@dataclass(frozen=True)
class End:
    """How a try ended. status: of Ray, or LOST; code: the driver's exit code where it had one."""

    status: str
    code: int | None
    message: str
    seconds: float

    @property
    def final(self) -> int | None:
        """The exit code that a new try would not change."""
        if self.status == "SUCCEEDED":
            return 0
        return self.code if self.code in (EXIT_USAGE, EXIT_QUARANTINED) else None

    def __str__(self) -> str:
        how = f"ended with exit code {self.code}" if self.code is not None else f"is {self.status.lower()}"
        return f"{how} after {self.seconds:.0f} s" + (f": {self.message}" if self.message and self.code is None else "")


def see_through(config: SubmitConfig, say: Callable[[str], None], show: Callable[[str], None]) -> int:
    """Submit, follow, and submit again; the exit code of the job. say: what happens; show: the job's own words.

    Raises UsageError for a wrong command, RunError when the job was stopped, fails ERRORS times in a row, or is not done in
    time.
    """
    variables = _variables(config.env)
    until = time.monotonic() + 3600 * config.hours
    jobs, errors = _Jobs(config, variables, until, say, show), 0
    while True:
        name = jobs.running() or jobs.submit()
        end = jobs.follow(name)
        if end.final is not None:
            return end.final
        if end.status == "STOPPED":
            raise RunError(f"{name} was stopped by someone. Start the same command again to go on")
        errors = 0 if end.code != EXIT_ERROR else 1 if end.seconds > LONG else errors + 1
        if errors == ERRORS:
            raise RunError(f"{name}, like the {ERRORS - 1} before it, {end}. Mend what it says, and start again")
        say(f"{name} {end}; submitting it again")
        if errors:
            time.sleep(ERROR_SECONDS)


def _variables(words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise UsageError(f"--env {word!r} is not KEY=VALUE, as in AWS_REGION=eu-central-1")
    return dict(word.split("=", 1) for word in words)


class _Jobs:
    """The tries of one command on one cluster, which may go away and come back empty."""

    def __init__(
        self,
        config: SubmitConfig,
        variables: dict[str, str],
        until: float,
        say: Callable[[str], None],
        show: Callable[[str], None],
    ):
        self.config, self.variables, self.until, self.say, self.show = config, variables, until, say, show
        self.entrypoint = shlex.join(config.command)
        self.prefix = f"shoal-{hashlib.sha256(self.entrypoint.encode()).hexdigest()[:10]}-"
        self.answered = False

    def running(self) -> str | None:
        """A try that runs or waits already: of this command before it was stopped, or of the same one elsewhere."""
        known = self.ask(self._known)
        return next((name for name, status in known.items() if status not in OVER), None)

    def submit(self) -> str:
        """A new try. One whose answer was lost is found, not submitted twice."""
        number = 1 + max((int(name.removeprefix(self.prefix)) for name in self.ask(self._known)), default=0)
        name = f"{self.prefix}{number:04d}"
        environment = {"working_dir": self.config.working_dir, "env_vars": self.variables}

        def attempt(client: Any) -> None:
            if name not in self._known(client):
                client.submit_job(entrypoint=self.entrypoint, submission_id=name, runtime_env=environment)

        self.ask(attempt)
        self.say(f"submitted {name}")
        return name

    def follow(self, name: str) -> End:
        """Show its log until it ends, or its cluster is found to have forgotten it."""
        began, shown = time.monotonic(), 0
        while True:
            details, log = self.ask(lambda client: _state(client, name))
            self.show(log[shown:])
            shown = max(shown, len(log))
            status = details.status if details else LOST
            if status in OVER:
                code, message = (details.driver_exit_code, details.message) if details else (None, "the head is new")
                return End(str(status), code, (message or "").strip()[-500:], time.monotonic() - began)
            time.sleep(max(POLL_SECONDS, shown / LOG_BYTES_A_SECOND))

    def ask(self, question: Callable[[Any], T]) -> T:
        """The answer of the cluster, waited for while it is away. Raises RunError when time is up, or it never was there."""
        away = False
        while time.monotonic() < self.until:
            try:
                found = _within(ANSWER_SECONDS, lambda: question(_client(self.config.address)))
            except (ConnectionError, TimeoutError, RuntimeError, OSError) as error:
                if not self.answered and not isinstance(error, TimeoutError):
                    raise RunError(
                        f"no Ray job server answers at {self.config.address}: {error}. Start the cluster, or its tunnel "
                        "(ray dashboard cluster/aws.yaml), or correct --address"
                    ) from error
                if not away:
                    self.say(f"{self.config.address} does not answer ({type(error).__name__}): waiting for it")
                away = True
                time.sleep(POLL_SECONDS)
            else:
                if away:
                    self.say(f"{self.config.address} is back")
                self.answered = True
                return found
        raise RunError(f"not done in {self.config.hours:g} hours. Start the same command again to go on")

    def _known(self, client: Any) -> dict[str, str]:
        jobs = {job.submission_id: str(job.status) for job in client.list_jobs() if job.submission_id}
        return {name: status for name, status in jobs.items() if name.startswith(self.prefix)}


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def _state(client: Any, name: str) -> tuple[Any, str]:
    """A job's details, None where nobody knows it, and its log so far."""
    details = next((job for job in client.list_jobs() if job.submission_id == name), None)
    return details, client.get_job_logs(name) if details else ""


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

"""A double of Ray's job server, for the rules of submitting again. tests/engine/test_submit.py has one job on a real server."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobType

STARTED = 1_000_000  # milliseconds since the epoch


@dataclass(frozen=True)
class JobEnd:
    """The output and the end of one submission. code: of its driver; -9 for one killed by SIGKILL. seconds: it ran.

    stopped: by someone. forgotten: its cluster came back empty.
    """

    code: int = 0
    output: str = ""
    seconds: float = 1.0
    stopped: bool = False
    forgotten: bool = False


@dataclass
class JobServer:
    """Ends the submissions one after the other as `ends` says; the last end counts for all that follow.

    A submission runs when it is listed for the first time, with half of its output, and has ended at the second listing.
    failures: exceptions that the next requests raise, in order.
    """

    ends: Sequence[JobEnd]
    failures: list[Exception] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    forgotten: set[int] = field(default_factory=set)
    listings: int = 0  # since the last submission

    def client(self, address: str) -> "JobServer":
        """Stands for ray.job_submission.JobSubmissionClient."""
        if self.failures:
            raise self.failures.pop(0)
        return self

    def list_jobs(self) -> list[JobDetails]:
        self.listings += 1
        newest = len(self.submitted) - 1
        jobs = []
        for number in range(len(self.submitted)):
            ended = number < newest or self.listings > 1
            if ended and self._end(number).forgotten:
                self.forgotten.add(number)
            if number not in self.forgotten:
                jobs.append(self._details(number, ended))
        return jobs

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str:
        self.submitted.append({"entrypoint": entrypoint, "submission_id": submission_id, "runtime_env": runtime_env})
        self.listings = 0
        return submission_id

    def get_job_logs(self, job_id: str) -> str:
        number = max(i for i, job in enumerate(self.submitted) if job["submission_id"] == job_id)
        output = self._end(number).output
        return output if self.listings > 1 else output[: len(output) // 2]

    def _end(self, number: int) -> JobEnd:
        return self.ends[min(number, len(self.ends) - 1)]

    def _details(self, number: int, ended: bool) -> JobDetails:
        end, job = self._end(number), self.submitted[number]
        status = JobStatus.RUNNING
        if ended:
            status = JobStatus.STOPPED if end.stopped else JobStatus.FAILED if end.code else JobStatus.SUCCEEDED
        return JobDetails(
            type=JobType.SUBMISSION,
            submission_id=job["submission_id"],
            entrypoint=job["entrypoint"],
            status=status,
            message=f"the driver ended\n{end.output}" if ended else "the driver runs",
            driver_exit_code=end.code if ended else None,
            start_time=STARTED,
            end_time=STARTED + round(1000 * end.seconds) if ended else None,
        )

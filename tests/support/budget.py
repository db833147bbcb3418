"""Seconds of each test file, printed after a run; in CI a file over its budget fails the run.

A file may take BUDGET seconds, or SHARE of all seconds of the run where that is more: a slow or busy machine is slow in every file.
"""

import os
from collections import Counter

import pytest

BUDGET = 45.0  # seconds a file
SHARE = 0.1  # of a run's seconds
SHOWN = 12  # files in the table


class FileBudget:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.location[0]] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._over() and os.environ.get("CI"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        write(f"{self.seconds.total():7.0f} s in {len(self.seconds)} files")
        for name, seconds in self.seconds.most_common(SHOWN):
            write(f"{seconds:7.1f} s  {name}")
        for name in self._over():
            write(
                f"over its budget of {self._budget():.0f} s: {name}. Start fewer processes, or move long tests to make scale"
            )

    def _budget(self) -> float:
        return max(BUDGET, SHARE * self.seconds.total())

    def _over(self) -> list[str]:
        return [name for name, seconds in self.seconds.items() if seconds > self._budget()]

"""Seconds of each test file, printed after a run; in CI a file over its budget fails the run.

The budget is of a quiet machine with 2 cores. A slower or busier machine gets more, by a small program that is timed before and
after the tests.
"""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

BUDGET = 45.0  # seconds a file
BUDGETS: dict[str, float] = {}  # of files that must be longer, with the reason beside each
REFERENCE_SECONDS = 0.20  # of `_work` on an idle core of an AMD EPYC with 2 cores
SHOWN = 12  # files in the table
ROOT = Path(__file__).parents[2]


class FileBudget:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.slowness = _slowness()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.location[0]] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.slowness = max(1.0, self.slowness, _slowness())
        if self._over() and os.environ.get("CI"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        total = sum(self.seconds.values())
        write(
            f"{total:7.0f} s in {len(self.seconds)} files; the machine is {self.slowness:.1f} times as slow as in its budget"
        )
        for name, seconds in self.seconds.most_common(SHOWN):
            write(f"{seconds:7.1f} s  {name}")
        for name in self._over():
            write(
                f"over its budget of {self._budget(name):.0f} s: {name}. Start fewer processes, or move long tests to make scale"
            )

    def _budget(self, name: str) -> float:
        return BUDGETS.get(name, BUDGET) * self.slowness

    def _over(self) -> list[str]:
        return [name for name, seconds in self.seconds.items() if seconds > self._budget(name)]


def _slowness() -> float:
    """The time of a fixed piece of work on this machine, over that on the reference machine."""
    began = time.perf_counter()
    _work()
    return (time.perf_counter() - began) / REFERENCE_SECONDS


def _work() -> int:
    return sum(number * number % 7 for number in range(4_000_000))

"""SIGKILL for workers and for the store, at random moments."""

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from tests.chaos.cluster import Head
from tests.chaos.tally import STEPS, Tally
from tests.real.s3 import Server

TICK = 0.1  # seconds
ANY_SHARE = 0.4  # of worker kills fall at any moment; the others wait for a part, so that loading workers come to work
ANY_SECONDS = 15.0
FLIGHT_SECONDS = 2.0
SERVER_PAUSE = (1.0, 9.0)  # seconds between the server's return and its next death
SERVER_DOWN = (0.5, 3.0)  # seconds
WHOLE_SHARE = 0.2  # of server kills take every daemon, not the gateway alone; back in 10 to 16 s


class WorkerKiller:
    """Run `kill_on` in a thread."""

    def __init__(self, head: Head, tally: Tally, seed: int):
        self.head, self.tally, self.random = head, tally, random.Random(seed)

    def kill_on(self) -> None:
        while self.tally.wanted("worker") and not self.tally.over.is_set():
            self._wait_for_the_moment()
            self._kill_one()

    def _wait_for_the_moment(self) -> None:
        before = self.tally.parts
        if self.random.random() < ANY_SHARE:
            self._pause(self.random.uniform(0, ANY_SECONDS), lambda: True)
        else:
            self._pause(float("inf"), lambda: self.tally.parts == before)
            self._pause(self.random.uniform(0, FLIGHT_SECONDS), lambda: True)

    def _pause(self, seconds: float, condition: Callable[[], bool]) -> None:
        """At most `seconds`, while the condition holds and the parts are not ahead of the kills."""
        end = time.monotonic() + seconds
        while condition() and time.monotonic() < end and not self.tally.late("worker"):
            if self.tally.over.wait(TICK):
                return

    def _kill_one(self) -> None:
        """A process of one step, each step with equal chance; there may be none between two drivers."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.head.workers():
            with suppress(psutil.Error, StopIteration):
                title = " ".join(process.cmdline())
                found.setdefault(next(step for step in STEPS if re.search(rf"\b{step}\b", title)), []).append(process)
        if not found:
            return
        step = self.random.choice(sorted(found))
        with suppress(psutil.NoSuchProcess):
            self.random.choice(found[step]).kill()
            self.tally.kills[step] += 1


class ServerKiller:
    """Call `step` from the main thread: the server dies with the thread that starts it."""

    def __init__(self, server: Server, tally: Tally, seed: int):
        self.server, self.tally, self.random = server, tally, random.Random(seed)

    def step(self) -> None:
        """Wait, kill, leave it dead for a while, bring it back with its data."""
        back = time.monotonic() + self.random.uniform(*SERVER_PAUSE)
        while self.tally.early("server") or (time.monotonic() < back and not self.tally.late("server")):
            if self.tally.over.wait(TICK):
                return
        whole = self.random.random() < WHOLE_SHARE
        (self.server.kill_all if whole else self.server.kill)()
        self.tally.kills["whole server" if whole else "gateway"] += 1
        self.tally.over.wait(self.random.uniform(*SERVER_DOWN))
        self.server.start()

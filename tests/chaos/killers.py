"""SIGKILL for workers and for the store, at random moments."""

import random
import time

import psutil

from tests.real.s3 import Server

from .cluster import Head
from .tally import Tally

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
        if self.random.random() < ANY_SHARE:
            self.tally.over.wait(self.random.uniform(0, ANY_SECONDS))
            return
        before = self.tally.parts
        while self.tally.parts == before and not self.tally.over.is_set():
            time.sleep(TICK)
        self.tally.over.wait(self.random.uniform(0, FLIGHT_SECONDS))

    def _kill_one(self) -> None:
        """An actor or a task with equal chance, where there are both; there may be none between two drivers."""
        found: dict[str, list[psutil.Process]] = {"actor": [], "task": []}
        for process in self.head.workers():
            try:
                found["actor" if "MapWorker" in process.cmdline()[0] else "task"].append(process)
            except (psutil.Error, IndexError):
                continue
        kinds = [kind for kind, processes in found.items() if processes]
        if not kinds:
            return
        kind = self.random.choice(kinds)
        try:
            self.random.choice(found[kind]).kill()
            self.tally.kills[kind] += 1
        except psutil.NoSuchProcess:
            pass


class ServerKiller:
    """Call `step` from the main thread: the server dies with the thread that starts it."""

    def __init__(self, server: Server, tally: Tally, seed: int):
        self.server, self.tally, self.random = server, tally, random.Random(seed)

    def step(self) -> None:
        """Wait, kill, leave it dead for a while, bring it back with its data."""
        if self.tally.over.wait(self.random.uniform(*SERVER_PAUSE)) or not self.tally.wanted("server"):
            return
        whole = self.random.random() < WHOLE_SHARE
        (self.server.kill_all if whole else self.server.kill)()
        self.tally.kills["whole server" if whole else "gateway"] += 1
        self.tally.over.wait(self.random.uniform(*SERVER_DOWN))
        self.server.start()

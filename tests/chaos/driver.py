"""The real command, started again and again until it ends well: killed at random, its exits and words recorded."""

import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.chaos.cluster import ROOT, Head
from tests.chaos.tally import Tally

TICK = 0.1  # seconds
EARLY_SHARE = 0.3  # of kills fall at any moment of a driver's start; the others while its shards are in flight
EARLY_SECONDS = 12.0  # import, plan, connect, first models loading
FLIGHT_SECONDS = 3.0  # after the first part of this driver
WAIT_FOR_PART = 150.0  # seconds; then a driver is killed though it has published nothing, and counted as slow
STALL = 240.0  # undisturbed seconds without a part that count as a hang: twice the patience with a store
ORPHAN_SECONDS = 30.0
FAILURES = 20  # starts in a row that end by themselves and publish nothing: no chaos explains that


class Driver:
    """Starts `command` until it exits 0. Run `supervise` in a thread."""

    def __init__(self, command: list[str], env: dict[str, str], head: Head, tally: Tally, logs: Path, seed: int):
        self.command, self.env, self.head, self.tally, self.logs = command, env, head, tally, logs
        self.random = random.Random(seed)
        self.orphans: list[tuple[psutil.Process, float]] = []
        self.process: subprocess.Popen | None = None

    def supervise(self) -> None:
        fruitless = 0
        while not self.tally.over.is_set():
            before = self.tally.parts
            code = self.one_life()
            fruitless = 0 if code == -signal.SIGKILL or self.tally.parts > before else fruitless + 1
            if code == 0 and not self.tally.enough():
                self.tally.fail(
                    f"the job finished with {self.tally.killed()} of {self.tally.target} kills of each kind: "
                    "give more --rows or less --shard-rows"
                )
            if code in (0, -signal.SIGABRT):
                break
            if fruitless == FAILURES:
                words = dict(self.tally.last_lines)
                self.tally.fail(f"{FAILURES} starts in a row ended with an error and did nothing: {words}")
                break
            time.sleep(self.random.uniform(0, 1))
        self._await_orphans()

    def one_life(self) -> int:
        """Start the driver, kill it at the moment drawn for it or let it end; returns its exit code."""
        self.tally.starts += 1
        log = self.logs / f"driver-{self.tally.starts:04d}.err"
        with log.open("wb") as err, log.with_suffix(".out").open("wb") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.env, start_new_session=True, **streams)
        before = self.tally.parts
        killed = self._wait_or_kill(self.process, before)
        if killed and self.tally.parts == before:
            self.tally.barren += 1
        self._record(log, killed, self.process.returncode)
        return self.process.returncode

    def end(self) -> None:
        """Leave no driver behind, whatever happened."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _wait_or_kill(self, process: subprocess.Popen, before: int) -> bool:
        """True when it was killed by us as part of the chaos."""
        began = last_change = time.monotonic()
        early = self.random.uniform(0, EARLY_SECONDS) if self.random.random() < EARLY_SHARE else None
        flight, in_flight_since, last_parts = self.random.uniform(0, FLIGHT_SECONDS), None, before
        while process.poll() is None and not self.tally.over.is_set():
            time.sleep(TICK)
            self._watch_orphans()
            now, parts = time.monotonic(), self.tally.parts
            if parts > last_parts:
                last_parts, last_change = parts, now
                in_flight_since = in_flight_since or now
            slow = in_flight_since is None and now - began > WAIT_FOR_PART
            due = (early is not None and now - began > early) or (
                in_flight_since is not None and now - in_flight_since > flight
            )
            if self.tally.late("driver") or ((due or slow) and self.tally.wanted("driver")):
                self.tally.slow += slow
                return self._kill(process)
            if now - last_change > STALL:
                self._abort(process)
        if process.poll() is None:
            process.kill()
        process.wait()
        return False

    def _kill(self, process: subprocess.Popen) -> bool:
        workers = self.head.workers()
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.tally.kills["driver"] += 1
        self.orphans += [(worker, time.monotonic()) for worker in workers]
        return True

    def _abort(self, process: subprocess.Popen) -> None:
        """faulthandler writes every thread's stack into the driver's log."""
        self.tally.fail(f"hang: no part and no end for {STALL:.0f} s; stacks in the log of start {self.tally.starts}")
        process.send_signal(signal.SIGABRT)
        process.wait()

    def _watch_orphans(self) -> None:
        """Workers of a killed driver must go away by themselves."""
        now, left = time.monotonic(), []
        for worker, since in self.orphans:
            if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
                left.append((worker, since))
            else:
                self.tally.orphan_seconds = max(self.tally.orphan_seconds, now - since)
        for worker, since in left:
            if now - since > ORPHAN_SECONDS:
                self.tally.fail(f"{worker} is still there {ORPHAN_SECONDS:.0f} s after its driver was killed")
        self.orphans = [(worker, since) for worker, since in left if now - since <= ORPHAN_SECONDS]

    def _await_orphans(self) -> None:
        while self.orphans:
            time.sleep(TICK)
            self._watch_orphans()

    def _record(self, log: Path, killed: bool, code: int) -> None:
        text = log.read_text(errors="replace")
        if "Traceback (most recent call last)" in text or "Fatal Python error" in text:
            start = max(text.find("Traceback (most recent call last)"), text.find("Fatal Python error"))
            self.tally.tracebacks.append(f"[start {self.tally.starts}, exit {code}]\n{text[start : start + 3000]}")
        if not killed and not self.tally.over.is_set():
            self.tally.exits[code] += 1
            line = next((line for line in reversed(text.splitlines()) if line.strip()), "(nothing on stderr)")
            self.tally.last_lines.setdefault(code, Counter())[line[:400]] += 1

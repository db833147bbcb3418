"""The lease of a run, or of a slice of its shards: one driver at a time.

    _holders/2-2-of-4-0007.json     created once, by the eighth driver of slice 2/4, which rewrites it every BEAT seconds

A new driver that sees such an object watches it. If it changes, its driver lives, and the new one is refused. If it does not
change for DEAD seconds of the watcher's own clock, its driver is dead, and the watcher creates the object of the next number:
of two watchers one gets it. Two drivers at once would waste work and spoil nothing: a shard has one name.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from ..errors import RunError, UsageError
from ..storage.filesystem import PROBE_OPTIONS
from ..storage.folder import Folder

log = logging.getLogger("shoal")

HOLDERS = "_holders"
BEAT = 5.0  # seconds; three small requests each
DEAD = 30.0  # seconds without a beat
LOOK = 1.0  # seconds between two reads of another driver's object


@dataclass(frozen=True)
class ShardSlice:
    """The shards of one driver: those whose number modulo `of`, counted from 1, is `first` to `last`."""

    first: int = 1
    last: int = 1
    of: int = 1

    def has(self, shard: int) -> bool:
        return self.first <= shard % self.of + 1 <= self.last

    def meets(self, other: "ShardSlice") -> bool:
        """Whether some shard is in both."""
        step = gcd(self.of, other.of)
        own, others = ({n % step for n in range(each.first, each.last + 1)} for each in (self, other))
        return not own.isdisjoint(others)

    def __str__(self) -> str:
        span = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return "the whole" if self == ALL else f"slice {span}/{self.of}"


ALL = ShardSlice()


def parse_slice(text: str | None) -> ShardSlice:
    """`2/4` or `1-3/4`; None is the whole. Raises UsageError."""
    if text is None:
        return ALL
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?/(\d+)", text):
        first, last, of = (int(digits) for digits in match.groups(default=match[1]))
        if 1 <= first <= last <= of:
            return ShardSlice(first, last, of)
    raise UsageError(f"--slice {text}: write I/N or I-J/N with 1 <= I <= J <= N, as in 2/4 or 1-3/4")


@contextmanager
def hold_lease(run: Folder, shard_slice: ShardSlice = ALL) -> Iterator[Callable[[], None]]:
    """Hold the lease of a slice while the block runs; yields a function that raises RunError once another driver has it.

    Raises RunError when a living driver holds a lease of some of the same shards. A dead driver's lease ends after DEAD seconds.
    """
    lease = _Lease(run, shard_slice)
    lease.take()
    beating = threading.Thread(target=lease.beat, name="lease", daemon=True)
    beating.start()
    try:
        yield lease.check
    finally:
        lease.ended.set()
        beating.join(2 * BEAT)  # it may hang in a store that is away; then the lease dies with the process


class _Lease:
    """This driver's object among the holders of a run. generation: its number."""

    def __init__(self, run: Folder, shard_slice: ShardSlice):
        self.run, self.shard_slice, self.generation, self.beats = run, shard_slice, 0, 0
        self.key = uuid.uuid4().hex  # a later driver's object may have the same name
        self.lost, self.ended = False, threading.Event()
        self.folder = run.below(HOLDERS)
        if run.url.startswith(
            ("s3://", "s3a://")
        ):  # timeouts under DEAD: a request that hangs must not look like a death
            self.folder = replace(self.folder, options=PROBE_OPTIONS | run.options)

    def take(self) -> None:
        """Create the object when no driver of some of the same shards is alive. Raises RunError where one is."""
        while True:
            holders = self.holders()
            self.wait_until_dead(holders)
            numbers = [number for other, number in holders.values() if other == self.shard_slice]
            self.generation = 1 + max(numbers, default=-1)
            if not self.claim():
                continue  # another was as quick, and will be seen to live
            # Of two drivers that created objects of overlapping slices at once, the first name in order stays.
            if rivals := self.holders().keys() - holders.keys() - {self.name()}:
                self.remove()
                if self.name() > min(rivals):
                    about = f"some of {self.shard_slice} of {self.run.url}"
                    raise RunError(f"another driver has begun at the same moment with {about}")
                continue  # it gives way, or has been at work before us
            for name in holders:
                self.folder.remove(name)
            self.folder.sweep(done={*holders, self.name()})
            return

    def name(self, later: int = 0) -> str:
        """The name of the object, or of that of a later driver."""
        own = self.shard_slice
        return f"{own.first}-{own.last}-of-{own.of}-{self.generation + later:04d}.json"

    def holders(self) -> dict[str, tuple[ShardSlice, int]]:
        """Leases of some of the same shards: by name, the slice and number of each."""
        holders = {}
        for name in self.folder.list():
            first, last, of, generation = map(int, re.findall(r"\d+", name))
            holders[name] = ShardSlice(first, last, of), generation
        return {name: holding for name, holding in holders.items() if holding[0].meets(self.shard_slice)}

    def wait_until_dead(self, holders: Mapping[str, tuple[ShardSlice, int]]) -> None:
        """Return when none of these holders is alive. Raises RunError for one that is."""
        seen = {name: stored for name in holders if (stored := self.folder.read_json(name)) and not _has_ended(stored)}
        if seen:
            who = _who(next(iter(seen.values())))
            log.info(f"held by {who}: waiting for some {DEAD:.0f} s to see whether it is alive")
        for _ in range(round(DEAD / LOOK)):  # looks that were answered: while the store is away nobody can beat
            if not seen:
                return
            time.sleep(LOOK)
            for name, stored in list(seen.items()):
                now = self.folder.read_json(name)
                if now is None:
                    del seen[name]
                elif now != stored:
                    raise RunError(
                        f"{holders[name][0]} of {self.run.url} is held by {_who(now)}, which is at work. Wait for it, end it, or "
                        "take another --slice or --output"
                    )

    def claim(self) -> bool:
        with suppress(FileNotFoundError):  # it was another's, who has ended since
            return self.folder.claim(self.name(), self.content())
        return False

    def check(self) -> None:
        if self.lost:
            raise RunError(
                f"another driver has taken over {self.shard_slice} of {self.run.url}: nothing was heard of this one for "
                f"{DEAD:.0f} s. What it did is kept; the other goes on"
            )

    def beat(self) -> None:
        """Rewrite the object until the lease ends, and remove it then. After an error the next beat tries again."""
        while not self.ended.wait(BEAT) and not self.lost:
            with suppress(Exception):
                self.lost = not self.is_mine() or self.folder.exists(self.name(later=1))
                self.beats += 1
                if not self.lost and not self.ended.is_set():
                    self.folder.publish(self.name(), self.content())
        with suppress(Exception):
            self.remove()

    def remove(self) -> None:
        if self.is_mine():
            self.folder.remove(self.name())

    def is_mine(self) -> bool:
        stored = self.folder.read_json(self.name())
        return stored is not None and stored["key"] == self.key

    def content(self) -> bytes:
        about = {"host": socket.gethostname(), "processes": _processes(), "pid": os.getpid()}
        return json.dumps(about | {"key": self.key, "beat": self.beats}).encode()


def _processes() -> str:
    """Names the machine, or the container, in which a process number means something."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _has_ended(stored: Mapping[str, Any]) -> bool:
    """Whether the process ran on this machine and has ended; for another machine only waiting can tell."""
    if stored["processes"] == _processes():
        try:
            os.kill(stored["pid"], 0)
        except OSError as error:  # PermissionError: it is another user's, and lives
            return isinstance(error, ProcessLookupError)
    return False


def _who(stored: Mapping[str, Any]) -> str:
    return f"process {stored['pid']} on {stored['host']}"

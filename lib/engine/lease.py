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
from collections.abc import Callable, Iterator
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
        return not {n % step for n in self._numbers()}.isdisjoint(n % step for n in other._numbers())

    def _numbers(self) -> range:
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        if self == ALL:
            return "the whole"
        span = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"slice {span}/{self.of}"


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
def hold_lease(run: Folder, shard_slice: ShardSlice) -> Iterator[Callable[[], None]]:
    """Hold the lease of a slice while the block runs; yields a function that raises RunError once another driver has it.

    Raises RunError when a living driver holds a lease of some of the same shards. The lease of a dead driver ends after some
    DEAD seconds.
    """
    lease = _take(_quick(run.below(HOLDERS)), shard_slice)
    beating = threading.Thread(target=lease.beat, name="lease", daemon=True)
    beating.start()
    try:
        yield lease.check
    finally:
        lease.ended.set()
        beating.join(2 * BEAT)  # it may hang in a store that is away; then the lease dies with the process


def _quick(folder: Folder) -> Folder:
    """The folder with timeouts well under DEAD: one connection that hangs must not look like a death."""
    is_s3 = folder.url.startswith(("s3://", "s3a://"))
    return replace(folder, options=PROBE_OPTIONS | folder.options) if is_s3 else folder


class _Lease:
    def __init__(self, folder: Folder, shard_slice: ShardSlice, generation: int):
        self.folder, self.shard_slice, self.generation = folder, shard_slice, generation
        self.name = _name(shard_slice, generation)
        self.key = uuid.uuid4().hex  # a later driver's object may have the same name
        self.beats = 0
        self.lost = False
        self.ended = threading.Event()

    def words(self) -> bytes:
        return json.dumps(_self() | {"key": self.key, "beat": self.beats}).encode()

    def check(self) -> None:
        if self.lost:
            raise RunError(
                f"another driver has taken over {self.shard_slice} of {_run(self.folder)}: nothing was heard of this one for "
                f"{DEAD:.0f} s. What it did is kept; the other goes on"
            )

    def beat(self) -> None:
        """Rewrite the object until the lease ends, and remove it then. After an error the next beat tries again."""
        while not self.ended.wait(BEAT) and not self.lost:
            with suppress(Exception):
                self.lost = not self.is_mine() or self.folder.exists(_name(self.shard_slice, self.generation + 1))
                self.beats += 1
                if not self.lost and not self.ended.is_set():
                    self.folder.publish(self.name, self.words())
        with suppress(Exception):
            self.remove()

    def is_mine(self) -> bool:
        stored = _read(self.folder, self.name)
        return stored is not None and stored["key"] == self.key

    def remove(self) -> None:
        if self.is_mine():
            self.folder.remove(self.name)


def _take(folder: Folder, shard_slice: ShardSlice) -> _Lease:
    while True:
        holders = _holders(folder, shard_slice)
        _wait_until_dead(folder, holders)
        generation = 1 + max((number for other, number in holders.values() if other == shard_slice), default=-1)
        lease = _Lease(folder, shard_slice, generation)
        if not _claim(lease):
            continue  # another was as quick, and will be seen to live
        if rivals := _holders(folder, shard_slice).keys() - holders.keys() - {lease.name}:
            lease.remove()
            if lease.name > min(rivals):
                raise RunError(
                    f"another driver has begun at the same moment with some of {shard_slice} of {_run(folder)}"
                )
            continue  # it gives way, or has been at work before us
        for name in holders:
            folder.remove(name)
        folder.sweep(done={*holders, lease.name})
        return lease


def _claim(lease: _Lease) -> bool:
    with suppress(FileNotFoundError):  # it was another's, who has ended since
        return lease.folder.claim(lease.name, lease.words())
    return False


def _wait_until_dead(folder: Folder, holders: dict[str, tuple[ShardSlice, int]]) -> None:
    """Return when none of these holders is alive. Raises RunError for one that is."""
    seen = {name: words for name in holders if (words := _read(folder, name)) and not _ended(words)}
    if seen:
        who = _who(next(iter(seen.values())))
        log.info(f"held by {who}: waiting for some {DEAD:.0f} s to see whether it is alive")
    for _ in range(round(DEAD / LOOK)):  # looks that were answered: while the store is away nobody can beat
        if not seen:
            return
        time.sleep(LOOK)
        for name, words in list(seen.items()):
            now = _read(folder, name)
            if now is None:
                del seen[name]
            elif now != words:
                raise RunError(
                    f"{holders[name][0]} of {_run(folder)} is held by {_who(now)}, which is at work. Wait for it, end it, or "
                    "take another --slice or --output"
                )


def _run(folder: Folder) -> str:
    return folder.url.removesuffix("/" + HOLDERS)


def _holders(folder: Folder, shard_slice: ShardSlice) -> dict[str, tuple[ShardSlice, int]]:
    """Leases of some of the same shards: by name, the slice and number of each."""
    parsed = {name: _parsed(name) for name in folder.list()}
    return {name: holding for name, holding in parsed.items() if holding[0].meets(shard_slice)}


def _name(shard_slice: ShardSlice, generation: int) -> str:
    return f"{shard_slice.first}-{shard_slice.last}-of-{shard_slice.of}-{generation:04d}.json"


def _parsed(name: str) -> tuple[ShardSlice, int]:
    first, last, _, of, generation = name.removesuffix(".json").split("-")
    return ShardSlice(int(first), int(last), int(of)), int(generation)


def _read(folder: Folder, name: str) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        return json.loads(folder.read(name))
    return None


def _self() -> dict[str, Any]:
    return {"host": socket.gethostname(), "processes": _processes(), "pid": os.getpid()}


def _processes() -> str:
    """Names the machine, or the container, in which a process number means something."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _ended(words: dict[str, Any]) -> bool:
    """Whether the process ran on this machine and has ended; for another machine only waiting can tell."""
    if words["processes"] != _processes():
        return False
    try:
        os.kill(words["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _who(words: dict[str, Any]) -> str:
    return f"process {words['pid']} on {words['host']}"

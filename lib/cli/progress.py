"""What a run says while it works and when it ends: one live line on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from .units import format_duration

LIVE_SECONDS = 0.5  # between two redraws on a terminal
LINE_SECONDS = 15.0  # between two plain lines in a log
STAGES = ("read", "tokenise", "encode", "write")


@dataclass
class Progress:
    """Counts of one driver's run, drawn by a thread while `shown`. Rates are of this driver alone."""

    shards: int  # of the whole run
    done: int = 0  # finished by earlier drivers and this one
    rows: int = 0
    tokens: int = 0
    encoded: int = 0  # tokens the model saw, after equal texts were merged
    padded: int = 0  # tokens a padded batch of 32 in arrival order would have seen
    errors: int = 0
    truncated: int = 0
    failures: int = 0  # tries of a shard that failed
    worked_from: float | None = None  # epoch seconds at which the first loaded worker began
    worked_until: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    began: float = field(default_factory=time.monotonic)
    first: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The line is drawn meanwhile."""
        self.began, self.first = time.monotonic(), self.done
        thread = threading.Thread(target=self._draw, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def add(self, counts: dict[str, Any], seconds: dict[str, float], worked_from: float | None) -> None:
        """One finished shard, which a loaded worker took at `worked_from`."""
        self.done += 1
        if worked_from is not None:
            self.worked_from = min(worked_from, self.worked_from or worked_from)
        self.worked_until = time.time()
        for name in ("rows", "tokens", "encoded", "padded", "errors", "truncated"):
            setattr(self, name, getattr(self, name) + counts.get(name, 0))
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.began, 1e-9)
        finished = self.done - self.first
        left = (self.shards - self.done) * elapsed / finished if finished else None
        parts = [
            f"{self.done}/{self.shards} shards",
            f"{self.rows / elapsed:,.0f} rows/s",
            *([f"{self.tokens / elapsed:,.0f} tokens/s"] if self.tokens else []),
            f"ETA {format_duration(left) if left is not None else '?'}",
        ]
        if self.errors:
            parts.append(f"{self.errors:,} bad rows kept")
        if self.failures:
            parts.append(f"{self.failures} tries failed")
        return "  ".join(parts)

    def _draw(self) -> None:
        live = self.stream.isatty()
        while not self._ended.wait(LIVE_SECONDS if live else LINE_SECONDS):
            self.stream.write(f"\r\033[K{self.line()}" if live else f"{self.line()}\n")
            self.stream.flush()
        if live:
            self.stream.write("\r\033[K")
            self.stream.flush()

    def shares(self) -> dict[str, float]:
        """Share of the stages' summed busy time, by stage."""
        total = sum(self.seconds.values()) or 1.0
        return {stage: self.seconds.get(stage, 0.0) / total for stage in STAGES}

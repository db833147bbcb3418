"""The progress of a run: a bar and one line on a terminal, plain lines in a log."""

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from .units import format_duration

LIVE_SECONDS = 0.5  # between two redraws on a terminal
LINE_SECONDS = 15.0  # between two plain lines in a log


class LiveLine:
    """One line about a run, which a thread redraws on a terminal and repeats in a log.

    text: returns the line. fraction: returns the share of the run that is done. stream: the terminal or the log; the standard error
    of the moment by default. On a terminal, what the process writes to the standard error meanwhile scrolls above the bar.
    """

    def __init__(self, text: Callable[[], str], fraction: Callable[[], float], stream: TextIO | None = None):
        self.text, self.fraction, self.stream = text, fraction, stream
        self._ended, self._thread = threading.Event(), threading.Thread()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the line while the block runs."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def start(self) -> None:
        stream = self.stream or sys.stderr
        redraws = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        draw = self._draw_bar if redraws else self._write_lines
        self._ended.clear()
        self._thread = threading.Thread(target=draw, args=(stream,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Remove the bar from a terminal; the lines of a log stay."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _write_lines(self, stream: TextIO) -> None:
        while not self._ended.wait(LINE_SECONDS):
            stream.write(f"{self.text()}\n")
            stream.flush()

    def _draw_bar(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        columns = (
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # the room that the text leaves
        )
        # soft_wrap: a path in a long message can be copied. redirect_stdout: the results go there, perhaps to a file.
        console = Console(file=stream, soft_wrap=True)
        shape: Any = {"auto_refresh": False, "transient": True, "expand": True, "redirect_stdout": False}
        with Progress(*columns, console=console, **shape) as bar:
            console.show_cursor(True)  # a driver that is killed leaves the terminal with its cursor
            task = bar.add_task(self.text(), total=1.0)
            while not self._ended.wait(LIVE_SECONDS):
                bar.update(task, completed=self.fraction(), description=self.text(), refresh=True)


@dataclass
class Progress:
    """Counts of one driver's run, and its seconds by step. Rates are of this driver alone.

    counts: `rows`, `errors`, `tokens`, ...; `encoded`: tokens that the model saw, after equal texts were merged; `padded`: tokens
    that padded batches of 32 in arrival order would have had.
    """

    shards: int  # of the whole run
    done: int = 0  # finished by earlier drivers and this one
    counts: Counter[str] = field(default_factory=Counter)
    failures: int = 0  # failed attempts at a shard
    worked_from: float | None = None  # epoch seconds at which the first loaded worker began
    worked_until: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    stream: TextIO | None = None
    began: float = field(default_factory=time.monotonic)
    resumed: int = 0  # shards that earlier drivers finished

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the line while the block runs."""
        self.began, self.resumed = time.monotonic(), self.done
        with LiveLine(self.line, self.fraction, self.stream).shown():
            yield

    def add(self, counts: Mapping[str, Any], seconds: Mapping[str, Any], worked_from: float | None) -> None:
        """Count a finished shard, which a loaded worker began at `worked_from`."""
        self.done += 1
        if worked_from is not None:
            self.worked_from = min(worked_from, self.worked_from or worked_from)
        self.worked_until = time.time()
        self.counts.update(counts)
        self.seconds.update(seconds)

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.began, 1e-9)
        finished = self.done - self.resumed
        left = (self.shards - self.done) * elapsed / finished if finished else None
        parts = [f"{self.done}/{self.shards} shards", f"{self.counts['rows'] / elapsed:,.0f} rows/s"]
        if self.counts["tokens"]:
            parts.append(f"{self.counts['tokens'] / elapsed:,.0f} tokens/s")
        parts.append(f"ETA {format_duration(left) if left is not None else '?'}")
        if self.counts["errors"]:
            parts.append(f"{self.counts['errors']:,} bad rows kept")
        if self.failures:
            parts.append(f"{self.failures} tries failed")
        return "  ".join(parts)

    def fraction(self) -> float:
        return self.done / max(self.shards, 1)

"""What is seen of a training run while it goes on, and what is kept: metrics files, TensorBoard events.

A step counts from 1, so step n is the run after n steps. A run that was killed does some steps again; of a step done twice
the later one counts.
"""

import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..cli.progress import LINE_SECONDS, LIVE_SECONDS
from ..cli.units import format_duration
from ..engine.parts import parquet_bytes
from ..storage.folder import Folder

WINDOW = 20  # steps that rates are taken over
READERS = 16  # requests in flight
PREFIX, WRITTEN = "metrics-", b"shoal.written"
EVENTS = "events.out.tfevents.0000000000.shoal"  # TensorBoard looks for "tfevents" in a name
FLOATS = ("epoch", "loss", "lr", "gradient_norm", "seconds")  # seconds: of the step, by the clock
COLUMNS = ("step", "epoch", "loss", "lr", "gradient_norm", "tokens", "rows", "seconds")
SCHEMA = pa.schema(
    [
        *((name, pa.float64() if name in FLOATS else pa.int64()) for name in COLUMNS),
        ("dataset", pa.string()),
    ]
)


def line(
    rows: Sequence[Mapping[str, Any]], total_steps: int, flops_per_token: float | None, peak_flops: float | None
) -> str:
    """The progress of a run whose latest steps are `rows`, in order, as SCHEMA.

    flops_per_token: of a training step, forward and backward. peak_flops: FLOP/s of all devices together; MFU is shown
    where both are known.
    """
    if not rows:
        return f"step 0/{total_steps}  waiting for the first step"
    last, seconds = rows[-1], max(sum(row["seconds"] for row in rows), 1e-9)
    rate = sum(row["tokens"] for row in rows) / seconds
    parts = [
        f"step {last['step']}/{total_steps}",
        f"loss {last['loss']:.4f}",
        f"lr {last['lr']:.1e}",
        f"{rate:,.0f} tokens/s",
        f"{sum(row['rows'] for row in rows) / seconds:,.0f} samples/s",
    ]
    if flops_per_token and peak_flops:
        parts.append(f"MFU {100 * rate * flops_per_token / peak_flops:.0f} %")
    left = max(0, total_steps - last["step"]) * seconds / len(rows)
    return "  ".join([*parts, f"ETA {format_duration(left)}"])


@dataclass
class TrainingProgress:
    """The line of a run, drawn by a thread between `start` and `stop`. Holds the last steps only."""

    total_steps: int
    flops_per_token: float | None = None
    peak_flops: float | None = None
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _recent: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _said: list[str] = field(default_factory=list)  # what is still to be written above the line
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._ended.clear()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End with the last line; it stays."""
        self._ended.set()
        if self._thread:
            self._thread.join()
        live = self.stream.isatty()
        self.stream.write(f"{self._text(live)}\n" if live else self._text(live))
        self.stream.flush()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Finished steps, in the order in which they were done; one that was done before follows a restart.

        A row without `seconds` is of a step that was given up, since its numbers are not finite.
        """
        with self._lock:
            for row in rows:
                if "seconds" not in row:
                    numbers = f"loss {row['loss']}, gradient norm {row['gradient_norm']}"
                    self._said.append(f"step {row['step']} could not be done: {numbers}")
                    continue
                if self._recent and row["step"] <= self._recent[-1]["step"]:
                    self._said.append(f"went back to step {row['step'] - 1}")
                    self._recent = deque((r for r in self._recent if r["step"] < row["step"]), maxlen=WINDOW)
                self._recent.append(row)
                self.peak_flops = row.get("peak_flops") or self.peak_flops

    def line(self) -> str:
        with self._lock:
            return line(tuple(self._recent), self.total_steps, self.flops_per_token, self.peak_flops)

    def _draw(self) -> None:
        live = self.stream.isatty()
        while not self._ended.wait(LIVE_SECONDS if live else LINE_SECONDS):
            self.stream.write(self._text(live))
            self.stream.flush()

    def _text(self, live: bool) -> str:
        with self._lock:
            said, self._said = self._said, []
        before = "\r\033[K" if live else ""
        return "".join(f"{before}{text}\n" for text in said) + before + self.line() + ("" if live else "\n")


def publish_metrics(folder: Folder, table: pa.Table) -> str | None:
    """Put the metrics of steps (columns as SCHEMA) in a file and return its name, which depends on the first step only: the
    same range done again takes the place of the earlier one. None where there are no rows."""
    if not table.num_rows:
        return None
    name = f"{PREFIX}{pc.min(table['step']).as_py():08d}.parquet"
    written = {WRITTEN: str(time.time_ns()).encode()}  # a range done again may begin elsewhere, and overlap
    table = table.select(SCHEMA.names).cast(SCHEMA).replace_schema_metadata(written)
    folder.publish(name, parquet_bytes(table))
    return name


def read_metrics(folder: Folder) -> pa.Table:
    """All steps in order, each once as it was done last; a table without rows where there are none. As SCHEMA."""
    with ThreadPoolExecutor(READERS) as pool:
        names = [name for name in sorted(folder.list(PREFIX)) if name.endswith(".parquet")]
        tables = list(pool.map(lambda name: pq.read_table(pa.BufferReader(folder.read(name))), names))
    tables.sort(key=lambda table: int((table.schema.metadata or {}).get(WRITTEN, 0)))
    whole = pa.concat_tables([SCHEMA.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])
    return last_of_each_step(whole)


def last_of_each_step(table: pa.Table) -> pa.Table:
    """The rows by step; of several rows of one step the last."""
    steps = table["step"].to_numpy()
    kept, first = np.unique(steps[::-1], return_index=True)
    return table.take(pa.array(len(steps) - 1 - first)) if len(kept) else table


def tensorboard(folder: Folder, table: pa.Table, evaluations: Sequence[Mapping[str, float]], began: float = 0.0) -> str:
    """Put a TensorBoard event file of the run and return its name, the same for every run and call.

    evaluations: a step and its measures each, by name. began: epoch seconds of the first step; an event's time is `began`
    and the seconds of the steps up to it, so that the same steps give the same bytes.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    steps, ends = table["step"].to_numpy(), began + np.cumsum(table["seconds"].to_numpy())
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / EVENTS
        writer = RecordWriter(str(path))
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for row, end in zip(table.to_pylist(), ends.tolist(), strict=True):
            scalars = {f"train/{name}": row[name] for name in ("loss", "lr", "gradient_norm")}
            scalars["train/tokens_per_second"] = row["tokens"] / max(row["seconds"], 1e-9)
            writer.write(_event(row["step"], end, scalars))
        for said in evaluations:
            done = int(np.searchsorted(steps, said["step"], side="right"))
            scalars = {f"eval/{name}": value for name, value in said.items() if name != "step"}
            writer.write(_event(int(said["step"]), float(ends[done - 1]) if done else began, scalars))
        writer.close()
        folder.publish(EVENTS, path.read_bytes())
    return EVENTS


def _event(step: int, at: float, scalars: Mapping[str, float | None]) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if value is not None]
    return bytes(Event(wall_time=at, step=step, summary=Summary(value=values)).SerializeToString())

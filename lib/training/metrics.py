"""Metrics of a training run: its live line, its metrics files, its TensorBoard events.

Steps are counted from 1: step n is the run after n steps. A run that was killed repeats some steps; the later result of a
repeated step counts.
"""

import logging
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

from ..cli.progress import LiveLine
from ..cli.units import format_duration
from ..engine.parts import parquet_bytes
from ..storage.folder import Folder

log = logging.getLogger("shoal")

WINDOW = 20  # steps over which rates are averaged
READERS = 16  # requests in flight
PREFIX, WRITTEN = "metrics-", b"shoal.written"
EVENTS = "events.out.tfevents.0000000000.shoal"  # TensorBoard finds files by "tfevents" in their name
FLOATS = ("epoch", "loss", "lr", "gradient_norm", "seconds")  # seconds: of the step, by the clock
COLUMNS = ("step", "epoch", "loss", "lr", "gradient_norm", "tokens", "rows", "seconds")
SCHEMA = pa.schema(
    [
        *((name, pa.float64() if name in FLOATS else pa.int64()) for name in COLUMNS),
        ("dataset", pa.string()),
    ]
)


def progress_line(
    rows: Sequence[Mapping[str, Any]], total_steps: int, flops_per_token: float | None, peak_flops: float | None
) -> str:
    """Describe the progress of a run whose latest steps are `rows`, in order, as SCHEMA.

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
    """The live line of a training run. Keeps the last WINDOW steps only."""

    total_steps: int
    flops_per_token: float | None = None
    peak_flops: float | None = None
    stream: TextIO | None = None  # the standard error of the moment by default
    _recent: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _live: LiveLine = field(init=False)

    def __post_init__(self) -> None:
        self._live = LiveLine(self.line, self.fraction, self.stream)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        """Write the last line, which stays."""
        self._live.stop()
        stream = self.stream or sys.stderr
        stream.write(f"{self.line()}\n")
        stream.flush()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add finished steps in their order. A step that was added before means that the run was restarted from there.

        A row without `seconds` is of a step that was skipped, because its loss or gradients are not finite.
        """
        for row in rows:
            if "seconds" not in row:
                numbers = f"loss {row['loss']}, gradient norm {row['gradient_norm']}"
                log.info(f"step {row['step']} could not be done: {numbers}")
                continue
            if self._recent and row["step"] <= self._recent[-1]["step"]:
                log.info(f"went back to step {row['step'] - 1}")
            with self._lock:
                earlier = (kept for kept in self._recent if kept["step"] < row["step"])
                self._recent = deque([*earlier, row], maxlen=WINDOW)
                self.peak_flops = row.get("peak_flops") or self.peak_flops

    def line(self) -> str:
        with self._lock:
            return progress_line(tuple(self._recent), self.total_steps, self.flops_per_token, self.peak_flops)

    def fraction(self) -> float:
        with self._lock:
            return self._recent[-1]["step"] / max(self.total_steps, 1) if self._recent else 0.0


def publish_metrics(folder: Folder, table: pa.Table) -> str | None:
    """Write the metrics of steps (columns as SCHEMA) to a file and return its name, or None where there are no rows.

    The name depends on the first step only: the file of a repeated range replaces the earlier one.
    """
    if not table.num_rows:
        return None
    name = f"{PREFIX}{pc.min(table['step']).as_py():08d}.parquet"
    written = {WRITTEN: str(time.time_ns()).encode()}  # a repeated range may begin at another step, and overlap
    table = table.select(SCHEMA.names).cast(SCHEMA).replace_schema_metadata(written)
    folder.publish(name, parquet_bytes(table))
    return name


def read_metrics(folder: Folder) -> pa.Table:
    """Read the last result of each step, in order (columns as SCHEMA); no rows where there are no files."""
    with ThreadPoolExecutor(READERS) as pool:
        names = [name for name in sorted(folder.list(PREFIX)) if name.endswith(".parquet")]
        tables = list(pool.map(lambda name: pq.read_table(pa.BufferReader(folder.read(name))), names))
    tables.sort(key=lambda table: int((table.schema.metadata or {}).get(WRITTEN, 0)))
    whole = pa.concat_tables([SCHEMA.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])
    return last_of_each_step(whole)


def last_of_each_step(table: pa.Table) -> pa.Table:
    """Sort the rows by step and keep the last row of each."""
    steps = table["step"].to_numpy()
    kept, first = np.unique(steps[::-1], return_index=True)
    return table.take(pa.array(len(steps) - 1 - first)) if len(kept) else table


def tensorboard(folder: Folder, table: pa.Table, evaluations: Sequence[Mapping[str, float]], began: float = 0.0) -> str:
    """Write a TensorBoard event file of the run and return its name, which is the same for every run.

    evaluations: a step and its measures each, by name. began: epoch seconds of the first step. The time of an event is
    `began` plus the seconds of the steps up to it, so that the same steps give the same bytes.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    steps, ends = table["step"].to_numpy(), began + np.cumsum(table["seconds"].to_numpy())
    with tempfile.TemporaryDirectory() as folder_path:
        path = Path(folder_path) / EVENTS
        writer = RecordWriter(str(path))
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for row, end in zip(table.to_pylist(), ends.tolist(), strict=True):
            scalars = {f"train/{name}": row[name] for name in ("loss", "lr", "gradient_norm")}
            scalars["train/tokens_per_second"] = row["tokens"] / max(row["seconds"], 1e-9)
            writer.write(_event(row["step"], end, scalars))
        for scores in evaluations:
            done = int(np.searchsorted(steps, scores["step"], side="right"))
            scalars = {f"eval/{name}": value for name, value in scores.items() if name != "step"}
            writer.write(_event(int(scores["step"]), float(ends[done - 1]) if done else began, scalars))
        writer.close()
        folder.publish(EVENTS, path.read_bytes())
    return EVENTS


def _event(step: int, at: float, scalars: Mapping[str, float | None]) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if value is not None]
    return bytes(Event(wall_time=at, step=step, summary=Summary(value=values)).SerializeToString())

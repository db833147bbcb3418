"""Metrics of a training run: its live line, its metrics files, its TensorBoard events.

Steps are counted from 1: step n is the run after n steps. A run that was killed repeats some steps; the later result of a
repeated step counts.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


@dataclass
class TrainingProgress:
    """The live line of a training run, of its last WINDOW steps.

    flops_per_token: of a training step, forward and backward. peak_flops: FLOP/s of all devices together; MFU is shown where
    both are known. stream: the standard error of the moment by default.
    """

    total_steps: int
    flops_per_token: float | None = None
    peak_flops: float | None = None
    stream: TextIO | None = None
    _recent: list[Mapping[str, Any]] = field(default_factory=list)  # replaced, never changed: another thread reads it

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the line while the block runs. The last one stays."""
        try:
            with LiveLine(self.line, self.fraction, self.stream).shown():
                yield
        finally:
            print(self.line(), file=self.stream or sys.stderr, flush=True)

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
            earlier = [kept for kept in self._recent if kept["step"] < row["step"]]
            self._recent = [*earlier, row][-WINDOW:]
            self.peak_flops = row.get("peak_flops") or self.peak_flops

    def line(self) -> str:
        rows = self._recent
        if not rows:
            return f"step 0/{self.total_steps}  waiting for the first step"
        last, seconds = rows[-1], max(sum(row["seconds"] for row in rows), 1e-9)
        rate = sum(row["tokens"] for row in rows) / seconds
        parts = [
            f"step {last['step']}/{self.total_steps}",
            f"loss {last['loss']:.4f}",
            f"lr {last['lr']:.1e}",
            f"{rate:,.0f} tokens/s",
            f"{sum(row['rows'] for row in rows) / seconds:,.0f} samples/s",
        ]
        if self.flops_per_token and self.peak_flops:
            parts.append(f"MFU {100 * rate * self.flops_per_token / self.peak_flops:.0f} %")
        left = max(0, self.total_steps - last["step"]) * seconds / len(rows)
        return "  ".join([*parts, f"ETA {format_duration(left)}"])

    def fraction(self) -> float:
        rows = self._recent
        return rows[-1]["step"] / max(self.total_steps, 1) if rows else 0.0


def publish_metrics(folder: Folder, table: pa.Table) -> None:
    """Write the metrics of steps (at least one; columns as SCHEMA) to a file, which is named after the first step only: the
    file of a repeated range replaces the earlier one."""
    name = f"{PREFIX}{pc.min(table['step']).as_py():08d}.parquet"
    written = {WRITTEN: str(time.time_ns()).encode()}  # a repeated range may begin at another step, and overlap
    table = table.select(SCHEMA.names).cast(SCHEMA).replace_schema_metadata(written)
    folder.publish(name, parquet_bytes(table))


def read_metrics(folder: Folder) -> pa.Table:
    """Read the last result of each step, in order (columns as SCHEMA); no rows where there are no files."""
    with ThreadPoolExecutor(READERS) as pool:
        names = [name for name in sorted(folder.list(PREFIX)) if name.endswith(".parquet")]
        tables = list(pool.map(lambda name: pq.read_table(pa.BufferReader(folder.read(name))), names))
    tables.sort(key=lambda table: int((table.schema.metadata or {}).get(WRITTEN, 0)))
    whole = pa.concat_tables([SCHEMA.empty_table(), *(table.replace_schema_metadata(None) for table in tables)])
    _, places = np.unique(
        whole["step"].to_numpy()[::-1], return_index=True
    )  # of the last row of each step, from the end
    return whole.take(pa.array(whole.num_rows - 1 - places))


def tensorboard(folder: Folder, table: pa.Table, scores: Sequence[Mapping[str, Any]]) -> None:
    """Write a TensorBoard event file of the run: EVENTS.

    scores: rows of a step, and of those that were evaluated the name `measure` and its value under that name. The time of an
    event is the seconds of the steps up to it, so that the same steps give the same bytes.
    """
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    steps, ends = table["step"].to_numpy(), np.cumsum([0.0, *table["seconds"].to_numpy()])
    with tempfile.TemporaryDirectory() as folder_path:
        path = Path(folder_path) / EVENTS
        writer = RecordWriter(str(path))
        writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        for row, end in zip(table.to_pylist(), ends[1:].tolist(), strict=True):
            scalars = {f"train/{name}": row[name] for name in ("loss", "lr", "gradient_norm")}
            scalars["train/tokens_per_second"] = row["tokens"] / max(row["seconds"], 1e-9)
            writer.write(_event(row["step"], end, scalars))
        for row in scores:
            if "measure" in row:
                end = ends[np.searchsorted(steps, row["step"], side="right")]
                writer.write(_event(row["step"], float(end), {f"eval/{row['measure']}": row[row["measure"]]}))
        writer.close()
        folder.publish(EVENTS, path.read_bytes())


def _event(step: int, at: float, scalars: Mapping[str, float]) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    return bytes(Event(wall_time=at, step=step, summary=Summary(value=values)).SerializeToString())

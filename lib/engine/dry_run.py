"""The dry run of a job over a corpus: shards, tokens from a sample, memory, hours and dollars."""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..cli.units import format_duration
from ..data.shards import Shard, count_shards, cut_shards, sample_shards
from ..storage.folder import Folder
from .job import Job
from .mapper import Mapper, Tables
from .planner import CorpusPlanner
from .run import Run
from .workers import WorkerPlan, worker_memory

SAMPLE_SHARDS, SAMPLE_ROWS = 8, 128
TIMED_ROWS = (8, 32, 128, 512, 2048)  # a worker is timed over the first of these that take it TIMED_SECONDS
TIMED_SECONDS = 4.0


class MeasurableMapper(Mapper, Protocol):
    """A mapper that can count what it would compute."""

    def lengths(self, tables: Tables) -> tuple[int, np.ndarray, np.ndarray]:
        """Counts of a shard that was read: rows of the input, and of each output row its tokens [n] and whether it is cut [n]."""
        ...


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers. `tokens_per_second`: of one worker, measured here; None where this machine is not like one."""

    files: int
    rows: float
    shards: int
    shard_rows: int
    tokens_a_row: float
    truncated_share: float
    output_bytes: float
    worker_bytes: int
    workers: WorkerPlan
    tokens_per_second: float | None

    @property
    def tokens(self) -> float:
        return self.rows * self.tokens_a_row

    @property
    def seconds(self) -> float | None:
        rate = self.tokens_per_second
        return None if not rate else self.tokens / (rate * self.workers.maximum)

    def lines(self, price_per_hour: float | None) -> list[str]:
        lines = [
            f"plan      {self.rows:,.0f} rows in {self.files:,} files, {self.shards:,} shards of about {self.shard_rows:,} rows",
            f"tokens    about {self.tokens:,.0f} ({self.tokens_a_row:.0f} a row, {self.truncated_share:.1%} of rows cut)",
            f"output    about {self.output_bytes / 2**30:,.2f} GiB beside ids and carried columns",
            f"workers   {self.workers}, about {self.worker_bytes / 2**30:.1f} GiB of memory each",
        ]
        if self.seconds is None:
            return [
                *lines,
                "time      unknown: run --dry-run on a machine like the workers, or a first run with --limit 10000",
            ]
        assert self.tokens_per_second
        lines.append(
            f"time      about {format_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s a worker, measured here"
        )
        if price_per_hour is not None:
            dollars = self.seconds / 3600 * self.workers.maximum * price_per_hour
            lines.append(f"cost      about ${dollars:,.2f} at ${price_per_hour:g} a worker-hour")
        return lines


def estimate(job: Job, output: Folder, planner: CorpusPlanner, bytes_a_row: int) -> Estimate:
    """Read and time a sample of the corpus; nothing is written. bytes_a_row: of the output.

    The job's mapper must be a MeasurableMapper. Raises ShoalError as the run itself would.
    """
    workers, corpus, rows = planner.workers.resolve(), planner.corpus, planner.rows_of_shard()
    plan = cut_shards(corpus, rows)
    mapper: MeasurableMapper = job.mapper(Run(output, plan, corpus.schema, {"id_column": corpus.id_column}), workers)
    sample = [mapper.lengths(mapper.read(shard)[0]) for shard in sample_shards(plan, SAMPLE_SHARDS, SAMPLE_ROWS)]
    rows_read, rows_out = sum(rows for rows, _, _ in sample), sum(len(tokens) for _, tokens, _ in sample)
    tokens, truncated = sum(int(t.sum()) for _, t, _ in sample), sum(int(c.sum()) for _, _, c in sample)
    timed = [sample_shards(plan, 1, rows)[0] for rows in TIMED_ROWS]
    return Estimate(
        files=len(corpus.files),
        rows=corpus.rows,
        shards=count_shards(plan),
        shard_rows=rows,
        tokens_a_row=tokens / max(rows_read, 1),
        truncated_share=truncated / max(rows_out, 1),
        output_bytes=corpus.rows * rows_out / max(rows_read, 1) * bytes_a_row,
        worker_bytes=worker_memory(planner.workers.weight_bytes),
        workers=workers,
        tokens_per_second=_rate(mapper, workers, timed) if tokens else None,
    )


def _rate(mapper: MeasurableMapper, workers: WorkerPlan, shards: list[Shard]) -> float | None:
    """Tokens a second of one worker, if this machine can be one: over the largest of the shards that time allows."""
    import torch

    if workers.gpus and not torch.cuda.is_available():
        return None
    work, rate = mapper.load(), None
    for shard in shards:
        tables, _ = mapper.read(shard)
        began = time.perf_counter()
        work(tables)
        spent = time.perf_counter() - began
        rate = float(mapper.lengths(tables)[1].sum()) / spent
        if spent > TIMED_SECONDS:
            break
    return rate

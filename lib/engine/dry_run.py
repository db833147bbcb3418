"""What a run would be, before it is: shards, tokens from a sample, memory, hours and dollars."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..cli.units import format_duration
from ..data.corpus import Corpus
from ..data.shards import Shard, count_shards, cut_shards, sample_shards
from ..storage.filesystem import absolute
from ..storage.folder import Folder
from .cluster import connect
from .job import Job, RunOptions
from .mapper import Mapper, Tables
from .run import Run
from .workers import WorkerPlan, plan_workers, worker_memory

SAMPLE_SHARDS, SAMPLE_ROWS = 8, 128
TIMED_ROWS = (8, 32, 128, 512, 2048)  # a worker is timed over the first of these that take it TIMED_SECONDS
TIMED_SECONDS = 4.0


class Measured(Mapper, Protocol):
    """A verb that can tell what it would compute."""

    def lengths(self, bundle: Tables) -> tuple[int, np.ndarray, np.ndarray]:
        """Of a prepared shard: rows read, and of each row made from them its tokens [n] and whether it is cut [n]."""
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
        said = [
            f"plan      {self.rows:,.0f} rows in {self.files:,} files, {self.shards:,} shards of about {self.shard_rows:,} rows",
            f"tokens    about {self.tokens:,.0f} ({self.tokens_a_row:.0f} a row, {self.truncated_share:.1%} of rows cut)",
            f"output    about {self.output_bytes / 2**30:,.2f} GiB beside ids and carried columns",
            f"workers   {self.workers}, about {self.worker_bytes / 2**30:.1f} GiB of memory each",
        ]
        if self.seconds is None:
            return [
                *said,
                "time      unknown: run --dry-run on a machine like the workers, or a first run with --limit 10000",
            ]
        assert self.tokens_per_second
        said.append(
            f"time      about {format_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s a worker, measured here"
        )
        if price_per_hour is not None:
            dollars = self.seconds / 3600 * self.workers.maximum * price_per_hour
            said.append(f"cost      about ${dollars:,.2f} at ${price_per_hour:g} a worker-hour")
        return said


def estimate(
    job: Job, options: RunOptions, corpus: Corpus, shard_rows: Callable[[Corpus, int], int], bytes_a_row: int
) -> Estimate:
    """Prepare and time a sample of the corpus; nothing is written. bytes_a_row: of the output.

    The job's verb must be a Measured one. Raises ShoalError as the run itself would.
    """
    connect()
    workers = plan_workers(options, job.weight_bytes)
    rows = options.shard_rows or shard_rows(corpus, workers.maximum)
    plan = cut_shards(corpus, rows)
    folder = Folder(absolute(options.output))
    verb: Measured = job.verb(Run(folder, plan, corpus.schema, {"id_column": corpus.id_column}), workers)
    sample = [verb.lengths(verb.prepare(shard)[0]) for shard in sample_shards(plan, SAMPLE_SHARDS, SAMPLE_ROWS)]
    read, made = sum(rows for rows, _, _ in sample), sum(len(tokens) for _, tokens, _ in sample)
    tokens, truncated = sum(int(t.sum()) for _, t, _ in sample), sum(int(c.sum()) for _, _, c in sample)
    return Estimate(
        files=len(corpus.files),
        rows=corpus.rows,
        shards=count_shards(plan),
        shard_rows=rows,
        tokens_a_row=tokens / max(read, 1),
        truncated_share=truncated / max(made, 1),
        output_bytes=corpus.rows * made / max(read, 1) * bytes_a_row,
        worker_bytes=worker_memory(job.weight_bytes),
        workers=workers,
        tokens_per_second=_rate(verb, workers, [sample_shards(plan, 1, rows)[0] for rows in TIMED_ROWS])
        if tokens
        else None,
    )


def _rate(verb: Measured, workers: WorkerPlan, shards: list[Shard]) -> float | None:
    """Tokens a second of one worker, if this machine can be one: over the largest of the shards that time allows."""
    import torch

    if workers.gpus and not torch.cuda.is_available():
        return None
    work, rate = verb.worker(), None
    for shard in shards:
        bundle, _ = verb.prepare(shard)
        began = time.perf_counter()
        work(bundle)
        spent = time.perf_counter() - began
        rate = float(verb.lengths(bundle)[1].sum()) / spent
        if spent > TIMED_SECONDS:
            break
    return rate

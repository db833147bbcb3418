"""The dry run of a job over a corpus: shards, tokens from a sample, memory, hours and dollars."""

import time
from dataclasses import dataclass
from typing import Any

from ..cli.units import format_duration
from ..data.shards import Shard, count_shards, cut_shards, sample_shards
from ..storage.folder import Folder
from .job import Job
from .planner import CorpusPlanner
from .run import Run
from .workers import WorkerPlan, worker_memory

SAMPLE_SHARDS, SAMPLE_ROWS = 8, 128
TIMED_ROWS = (8, 32, 128, 512, 2048)  # a worker is timed over the first of these that take it TIMED_SECONDS
TIMED_SECONDS = 4.0


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers. tokens_per_second: of one worker, measured here; None where this machine is not like one."""

    planner: CorpusPlanner
    shards: int
    tokens_a_row: float
    truncated_share: float
    output_bytes: float
    tokens_per_second: float | None

    def lines(self, price_per_hour: float | None) -> list[str]:
        corpus, workers, rate = self.planner.corpus, self.planner.workers.resolve(), self.tokens_per_second
        tokens, memory = corpus.rows * self.tokens_a_row, worker_memory(self.planner.workers.weight_bytes)
        shards = f"{self.shards:,} shards of about {self.planner.rows_of_shard():,} rows"
        lines = [
            f"plan      {corpus.rows:,.0f} rows in {len(corpus.files):,} files, {shards}",
            f"tokens    about {tokens:,.0f} ({self.tokens_a_row:.0f} a row, {self.truncated_share:.1%} of rows cut)",
            f"output    about {self.output_bytes / 2**30:,.2f} GiB beside ids and carried columns",
            f"workers   {workers}, about {memory / 2**30:.1f} GiB of memory each",
        ]
        if not rate:
            advice = "run --dry-run on a machine like the workers, or a first run with --limit 10000"
            return [*lines, f"time      unknown: {advice}"]
        seconds = tokens / (rate * workers.maximum)
        lines.append(f"time      about {format_duration(seconds)} at {rate:,.0f} tokens/s a worker, measured here")
        if price_per_hour is not None:
            dollars = seconds / 3600 * workers.maximum * price_per_hour
            lines.append(f"cost      about ${dollars:,.2f} at ${price_per_hour:g} a worker-hour")
        return lines


def estimate(job: Job, output: Folder, planner: CorpusPlanner, bytes_a_row: int) -> Estimate:
    """Read and time a sample of the corpus; nothing is written. bytes_a_row: of the output. Raises ShoalError as the run would.

    The job's mapper must have `lengths(tables)`: rows of the input, and of each output row its tokens [n] and whether it is cut [n].
    """
    planner.describe()  # raises for an input that the run would refuse
    corpus, workers = planner.corpus, planner.workers.resolve()
    plan = cut_shards(corpus, planner.rows_of_shard())
    mapper = job.mapper(Run(output, plan, corpus.schema, {"id_column": corpus.id_column}), workers)
    sample = [mapper.lengths(mapper.read(shard)[0]) for shard in sample_shards(plan, SAMPLE_SHARDS, SAMPLE_ROWS)]
    rows_read, rows_out = sum(rows for rows, _, _ in sample), sum(len(tokens) for _, tokens, _ in sample)
    tokens, truncated = sum(int(t.sum()) for _, t, _ in sample), sum(int(c.sum()) for _, _, c in sample)
    timed = [sample_shards(plan, 1, rows)[0] for rows in TIMED_ROWS]
    return Estimate(
        planner,
        shards=count_shards(plan),
        tokens_a_row=tokens / max(rows_read, 1),
        truncated_share=truncated / max(rows_out, 1),
        output_bytes=corpus.rows * rows_out / max(rows_read, 1) * bytes_a_row,
        tokens_per_second=_rate(mapper, workers, timed) if tokens else None,
    )


def _rate(mapper: Any, workers: WorkerPlan, shards: list[Shard]) -> float | None:
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

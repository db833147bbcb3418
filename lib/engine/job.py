"""From a command's options to its outcome: open or resume the run, decide the workers, do what is pending."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from ..cli.progress import Progress
from ..data.corpus import Corpus, CorpusOptions
from ..data.shards import count_shards
from ..errors import RunError, UsageError
from ..storage.filesystem import absolute, parse_options
from ..storage.folder import Folder
from ..storage.listing import covers
from . import executor
from .cluster import connect
from .executor import Outcome
from .lease import ALL, ShardSlice, hold_lease
from .mapper import Mapper
from .parts import read_manifest
from .run import Run, missing, open_ledger, open_planned
from .workers import WorkerOptions, WorkerPlan, plan_workers

log = logging.getLogger("shoal")

TEXT_BYTES = 256 << 20  # of text a shard, so that long documents do not fill a worker's memory
SHARDS_A_WORKER = 8  # at least, so that a small corpus keeps every worker busy to the end
LEAST_SHARD_ROWS = 1000  # a shard costs about 20 ms and an object


@dataclass(frozen=True, kw_only=True)
class RunOptions(CorpusOptions, WorkerOptions):
    """What every job over shards can be told."""

    output: str = field(
        metadata={"help": "Folder for the Parquet parts; any fsspec URL. The same command resumes there."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Tokens a batch. Default: 1024 on CPUs, by model size on GPUs.", "min": 1}
    )
    storage_option: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "fsspec option for input and output, as endpoint_url=http://host:9000. Repeat it for more.",
            "many": True,
        },
    )
    strict: bool = field(default=False, metadata={"help": "Stop at the first row or file that cannot be used."})
    dry_run: bool = field(default=False, metadata={"help": "Print plan, tokens, memory and cost, and stop."})
    price_per_hour: float | None = field(default=None, metadata={"help": "Dollars a worker-hour, for --dry-run."})


@dataclass(frozen=True, kw_only=True)
class SharedRunOptions(RunOptions):
    """What a job can be told whose shards several drivers may share."""

    slice: str | None = field(
        default=None,
        metadata={
            "help": "Do slice I/N of the shards, or I-J/N; other drivers do the others. With it give --max-workers."
        },
    )


@dataclass(frozen=True)
class Job:
    """What one verb makes of its options.

    said: what it does, in a few words. settings: what fixes the rows and their values; a run with others is another run.
    verb: made once the run is open and the workers are decided. calibrated: the verb with what a run finds out once, by
    its workers, before the first shard. model: its name; weight_bytes: what a worker loads. share: the shards to do.
    """

    said: str
    settings: Mapping[str, Any]
    verb: Callable[[Run, WorkerPlan], Any]
    calibrated: Callable[[Any, Run, WorkerPlan], Any] = lambda verb, ledger, workers: verb
    model: str | None = None
    weight_bytes: int = 0
    share: ShardSlice = ALL


def carry_out(job: Job, options: RunOptions, shard_rows: Callable[[Corpus, int], int]) -> Outcome:
    """Plan the input's rows or resume, do what is pending, audit.

    shard_rows: rows a shard, of the corpus and the most workers there can be, where the options do not say. Raises
    ShoalError before anything scales, for what cannot work.
    """
    folder, workers = _folder(options), cache(partial(_connected, job, options))

    def choose_rows(corpus: Corpus) -> int:
        return options.shard_rows or shard_rows(corpus, workers().maximum)

    storage = parse_options(options.storage_option)
    ledger = open_ledger(folder, job.settings, options, storage, options.strict, choose_rows, _about(job))
    return _do_pending(job, ledger, workers)


def carry_out_planned(job: Job, options: RunOptions, plan: Callable[[], tuple[pa.Table, pa.Schema]]) -> Outcome:
    """The same over a plan that is made when the run has none yet (PLAN_SCHEMA, and the columns of what it reads)."""
    workers = cache(partial(_connected, job, options))

    def made() -> tuple[pa.Table, pa.Schema]:
        workers()  # a cluster without room is told before the work on the plan, not after it
        return plan()

    ledger = open_planned(_folder(options), job.settings, made, _about(job))
    return _do_pending(job, ledger, workers)


def _folder(options: RunOptions) -> Folder:
    folder = Folder(absolute(options.output), parse_options(options.storage_option))
    folder.probe()
    return folder


def _connected(job: Job, options: RunOptions) -> WorkerPlan:
    connect()
    return plan_workers(options, job.weight_bytes)


def _about(job: Job) -> dict[str, Any]:
    return {name: version(name) for name in ("ray", "torch", "transformers", "pyarrow")} | {"model": job.model}


def _do_pending(job: Job, ledger: Run, workers: Callable[[], WorkerPlan]) -> Outcome:
    total, share = count_shards(ledger.plan), job.share
    gone = missing(ledger)
    if not gone and len(parts := read_manifest(ledger.folder)) == total:
        log.info(f"nothing to do: all {total} shards are in {ledger.folder.url}")
        return Outcome(parts, {}, Progress(total, total))
    with hold_lease(ledger.folder, share) as still_held:
        gone = missing(ledger)  # another driver may have done some until now
        pending = [number for number in gone if share.has(number)]
        mine = sum(map(share.has, range(total)))
        progress = Progress(mine, mine - len(pending))
        if gone and not pending:
            log.info(f"nothing to do in {share}: its {mine} shards are in {ledger.folder.url}")
            return Outcome([], {}, progress, len(gone))
        pool = workers()
        of = "" if share == ALL else f" in {share}"
        log.info(f"{job.said}, {len(pending)} of {mine} shards to do{of}, {pool}")
        verb: Mapper = job.calibrated(job.verb(ledger, pool), ledger, pool)
        return executor.execute(verb, ledger, pool, progress, pending, share, still_held)


def require_complete(outcome: Outcome, output: str) -> Outcome:
    """Raises RunError when shards were given up on: what is made of a run with holes is wrong."""
    for number, reason in outcome.quarantined.items():
        raise RunError(
            f"{len(outcome.quarantined)} shards of {output} failed, the first is {number}: {reason}. Mend the cause and "
            "start the same command again"
        )
    return outcome


def refuse_nested(url: str, options: RunOptions) -> None:
    """Raises UsageError for an output inside the input `url`."""
    if covers(url, options.output, parse_options(options.storage_option)):
        raise UsageError(f"--output {options.output} lies in {url}: its parts would be read as input")


def even_rows(corpus: Corpus, workers: int, most: int) -> int:
    """Rows a shard, at most `most`: of bounded text, and enough shards to keep every worker busy to the end."""
    by_text = int(TEXT_BYTES / max(corpus.row_bytes, 1.0))
    by_workers = int(corpus.rows / (SHARDS_A_WORKER * workers))
    return max(1, min(most, by_text, max(by_workers, LEAST_SHARD_ROWS)))

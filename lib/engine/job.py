"""A job over shards: open or resume its run, plan the workers, do the pending shards, audit."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from ..cli.options import group, option
from ..cli.progress import Progress
from ..data.corpus import Corpus
from ..data.shards import count_shards
from ..errors import RunError, UsageError
from ..storage.filesystem import StorageOptions, absolute
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from ..storage.listing import covers
from .executor import Outcome, execute
from .lease import ALL, ShardSlice, hold_lease
from .parts import read_manifest
from .planner import Planner
from .run import Run, missing
from .workers import WorkerPlan

log = logging.getLogger("shoal")

TEXT_BYTES = 256 << 20  # of text a shard, so that long documents do not fill a worker's memory
SHARDS_A_WORKER = 8  # at least, so that a small corpus keeps every worker busy to the end
MIN_SHARD_ROWS = 1000  # a shard costs about 20 ms and an object


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The output of a run over shards, and how strict it is."""

    output: str = option("Folder for the Parquet parts; any fsspec URL. The same command resumes there.")
    storage: StorageOptions = group(StorageOptions)
    strict: bool = option("Stop at the first row or file that cannot be used.", False)
    dry_run: bool = option("Print plan, tokens, memory and cost, and stop.", False)
    price_per_hour: float | None = option("Dollars a worker-hour, for --dry-run.", None)
    slice: str | None = option(
        "Do slice I/N of the shards, or I-J/N; other drivers do the others. With it give --max-workers.", None
    )

    @property
    def folder(self) -> Folder:
        """The output folder; a local path is made absolute, as processes of a cluster have other current folders."""
        return Folder(absolute(self.output), self.storage.fsspec)


@dataclass(frozen=True)
class Job:
    """A mapper and what fixes its output.

    label: what it does, in a few words. settings: what fixes the rows and their values; a run with others is another run.
    mapper: made once the run is open and the workers are planned. model: its name. shard_slice: the shards to do.
    """

    label: str
    settings: Mapping[str, Any]
    mapper: Callable[[Run, WorkerPlan], Any]
    model: str | None = None
    shard_slice: ShardSlice = ALL


def run_job(job: Job, folder: Folder, planner: Planner) -> Outcome:
    """Plan or resume the run in `folder`, do what is pending, audit. Raises ShoalError for what cannot work."""
    folder.probe()
    about = versions("ray", "torch", "transformers", "pyarrow") | {"model": job.model}
    run = Run.open(folder, job.settings, planner, about)
    total, shard_slice = count_shards(run.plan), job.shard_slice
    absent = missing(run)
    if not absent and len(parts := read_manifest(folder)) == total:
        log.info(f"nothing to do: all {total} shards are in {folder.url}")
        return Outcome(parts, {}, Progress(total, total))
    with hold_lease(folder, shard_slice) as check_lease:
        absent = missing(run)  # another driver may have done some until now
        pending = [number for number in absent if shard_slice.has(number)]
        own = sum(map(shard_slice.has, range(total)))
        progress = Progress(own, own - len(pending))
        if absent and not pending:
            log.info(f"nothing to do in {shard_slice}: its {own} shards are in {folder.url}")
            return Outcome([], {}, progress, len(absent))
        workers = planner.workers.resolve()
        of = "" if shard_slice == ALL else f" in {shard_slice}"
        log.info(f"{job.label}, {len(pending)} of {own} shards to do{of}, {workers}")
        return execute(job.mapper(run, workers), run, workers, progress, pending, shard_slice, check_lease)


@cache
def versions(*packages: str) -> dict[str, str]:
    """The installed versions. Kept, since reading one takes 5 ms."""
    return {name: version(name) for name in packages}


def stage_folder(output: Folder, name: str, *fixed: Any) -> Folder:
    """The folder of one stage of a job, `OUTPUT/_stages/NAME-KEY`. fixed: everything that decides its rows."""
    return output.below(f"_stages/{name}-{fingerprint(*fixed)}" if fixed else f"_stages/{name}")


def require_complete(outcome: Outcome, output: str) -> Outcome:
    """Raises RunError when shards were given up on: a result computed from a run with holes is wrong."""
    for number, reason in outcome.quarantined.items():
        raise RunError(
            f"{len(outcome.quarantined)} shards of {output} failed, the first is {number}: {reason}. Mend the cause and "
            "start the same command again"
        )
    return outcome


def refuse_nested(url: str, output: str, storage: Mapping[str, Any]) -> None:
    """Raises UsageError for an output inside the input `url`."""
    if covers(url, output, storage):
        raise UsageError(f"--output {output} lies in {url}: its parts would be read as input")


def even_rows(corpus: Corpus, workers: int, most: int) -> int:
    """Rows a shard, at most `most`: of bounded text, and enough shards to keep every worker busy to the end."""
    by_text = int(TEXT_BYTES / max(corpus.row_bytes, 1.0))
    by_workers = int(corpus.rows / (SHARDS_A_WORKER * workers))
    return max(1, min(most, by_text, max(by_workers, MIN_SHARD_ROWS)))

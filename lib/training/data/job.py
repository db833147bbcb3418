"""The training plan: global batches of pairs, or of single texts, from many files, in training order.

    OUTPUT/plan/_run.json         the settings of the plan; another plan is refused
    OUTPUT/plan/pairs-NAME/       a run over the rows of each --data: checked, and partitioned into buckets
    OUTPUT/plan/batches-EPOCH/    a run over buckets, once for every pass that the epochs from EPOCH on begin: a row
                                  group a global batch. There are several only where --max-steps cuts the epochs short
    OUTPUT/plan/order.parquet     the row group of the batch of each step; put last

The same command resumes each of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.shards import PLAN_SCHEMA, count_shards
from ...engine.actor_pool import shared_pool
from ...engine.job import Job, even_rows, require_complete, run_job
from ...engine.parts import parquet_bytes, read_facts
from ...engine.planner import CorpusPlanner, FixedPlanner, Planner
from ...engine.run import Run, check_same_settings, create_run_config, read_run_config
from ...engine.shuffle import MAX_RANGES, bucket_plan
from ...engine.workers import CpuWorkerOptions, WorkerPlan, WorkerRequest
from ...errors import UsageError
from ...storage.folder import Folder
from .batch_reader import ORDER, SCHEMA
from .batches import BatchesMapper, EntryShards
from .pairs import PartitionPairs
from .schedule import Stream, make_order, passes_of
from .sources import Entry, open_entry, parse_data, parse_weights
from .stats import Counts, check_batches, check_rows, count, merge_facts

MAX_BATCH = 65_536  # rows
SHARD_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data of a training, and the sizes of its batches and epochs.

    data: URL or NAME=URL words. weight: NAME=NUMBER words, passes over a --data or a dataset in an epoch. global_batch: rows of
    a step, over all workers; all of one dataset. group: passages of a row, a positive and negatives. max_steps: where the plan
    stops. seed: of every shuffle and draw.
    """

    data: tuple[str, ...]
    weight: tuple[str, ...] = ()
    global_batch: int
    group: int
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrainingPlan:
    """A finished plan: its folder, for BatchReader; its steps, and those of an epoch; the counts of its rows."""

    url: str
    steps: int
    epoch_steps: float
    counts: Counts


@shared_pool()
def plan(options: DataOptions, output: Folder, workers: CpuWorkerOptions) -> TrainingPlan:
    """Make the plan in OUTPUT/plan, or the rest of it. Raises UsageError, InputError or RunError, see stats too."""
    _check_numbers(options)
    urls, weights = parse_data(options.data), parse_weights(options.weight)
    folder = output.below("plan")
    folder.probe()
    entries = [open_entry(name, url, output.url, output.options) for name, url in urls.items()]
    if not any(entry.by_dataset for entry in entries):
        _check_names(weights, list(urls))
    fixed = _fixed(options, entries, weights)
    if (stored := read_run_config(folder)) is not None:
        check_same_settings(folder, stored["settings"], fixed)
    planning = _Planning(options, folder, WorkerRequest(workers.on_cpus()), fixed)
    pairs = {entry.name: planning.partition(entry) for entry in entries}
    datasets = {name for facts in pairs.values() for name, _ in facts["sets"]}
    _check_names(weights, [*urls, *sorted(datasets - set(urls))])
    for name, facts in pairs.items():
        check_rows(name, facts, options.global_batch)
    # Not before: a mistake that the first map finds can then be corrected by another command in the same folder.
    stored = create_run_config(folder, {"settings": fixed})
    check_same_settings(folder, stored["settings"], fixed)
    streams = [
        Stream(name, dataset, in_batch, weights.get(dataset, weights.get(name, 1.0)))
        for name, facts in pairs.items()
        for dataset, in_batch in sorted(facts["sets"])
    ]
    order, batched = planning.order(pairs, streams)
    folder.claim(ORDER, parquet_bytes(order))
    steps = pq.read_metadata(pa.BufferReader(folder.read(ORDER))).num_rows
    epoch_steps = sum(stream.weight * len(stream.batches(0)) for stream in streams)
    counts = count(pairs, batched, streams, options.global_batch)
    return TrainingPlan(folder.url, steps, epoch_steps, counts)


def _check_numbers(options: DataOptions) -> None:
    for name, most in {"global_batch": MAX_BATCH, "group": None, "epochs": None, "max_steps": None}.items():
        value = getattr(options, name)
        if value is not None and (value < 1 or (most and value > most)):
            bounds = f"1 to {most:,}" if most else "1 or more"
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range: give {bounds}")


def _check_names(weights: Mapping[str, float], names: Sequence[str]) -> None:
    unknown = next((name for name in weights if name not in names), None)
    if unknown is not None:
        some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UsageError(f"--weight names {unknown!r}, which is no --data and no dataset in one. Choose from: {some}")


def _fixed(options: DataOptions, entries: Sequence[Entry], weights: Mapping[str, float]) -> dict[str, Any]:
    """The settings on which the plan depends: data, weights and numbers."""
    return {
        **{f"files of {entry.name}": entry.fingerprint for entry in entries},
        **{f"weight of {name}": weight for name, weight in sorted(weights.items())},
        "data": [entry.name for entry in entries],
        **{name: getattr(options, name) for name in ("global_batch", "group", "epochs", "max_steps", "seed")},
    }


@dataclass(frozen=True)
class _Planning:
    """The two maps of a plan, and the order that follows from them. folder: OUTPUT/plan. fixed: the settings of the plan."""

    options: DataOptions
    folder: Folder
    workers: WorkerRequest
    fixed: Mapping[str, Any]

    def partition(self, entry: Entry) -> dict[str, Any]:
        """The first map over one entry; the facts of its rows, see stats.merge_facts."""
        seed, storage, buckets = self.options.seed, self.folder.options, entry.buckets(self.options.global_batch)
        mapper = PartitionPairs(entry.name, seed, buckets, entry.by_dataset, entry.columns, entry.odd, storage)
        fixed = {"job": "partition pairs", "files": entry.fingerprint, "buckets": buckets, "seed": seed}
        job = Job(f"plan: partitioning {entry.name}", fixed, lambda run, workers: mapper)
        planner = CorpusPlanner(
            entry.options, storage, lambda corpus, workers: even_rows(corpus, workers, SHARD_ROWS), self.workers
        )
        return merge_facts(self._run(job, f"pairs-{entry.name}", planner)[1])

    def order(
        self, pairs: Mapping[str, Mapping[str, Any]], streams: Sequence[Stream]
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """The order of the steps, and the facts of the parts that it names. Fills the streams. pairs: facts by entry.

        Where --max-steps cuts the epochs short, the second map first makes the epochs that suffice if every row fits into a
        batch, and then more until there are enough steps.
        """
        options, most = self.options, self.options.max_steps
        of_entry = {name: [stream for stream in streams if stream.entry == name] for name in pairs}
        # Steps of an epoch, at most:
        size = options.global_batch
        epoch_steps = sum(s.weight * (pairs[s.entry]["sets"][s.dataset, s.in_batch][0] // size) for s in streams)
        parts: list[str] = []
        batched: list[dict[str, Any]] = []
        order, done = SCHEMA.empty_table(), 0
        while done < options.epochs and (most is None or order.num_rows < most):
            lacking = options.epochs if most is None else math.ceil((most - order.num_rows) / epoch_steps)
            epochs = range(done, min(done + lacking, options.epochs))
            passes = {name: _passes(own, epochs) for name, own in of_entry.items()}
            if any(passes.values()):
                names, facts = self._batches(pairs, epochs, passes)
                _fill(streams, facts, len(parts))
                parts, batched = parts + names, batched + facts
            for name, rows in pairs.items():
                check_batches(name, of_entry[name], rows, size)
            done = epochs.stop
            order = make_order(streams, parts, done, options.seed, most)
            epoch_steps = max(order.num_rows, 1) / done
        return order, batched

    def _batches(
        self, pairs: Mapping[str, Mapping[str, Any]], epochs: range, passes: Mapping[str, range]
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """The second map over all buckets: its parts' names, from the plan's folder, and facts, in order."""
        options, storage = self.options, self.folder.options
        sources = {name: self.folder.below(f"pairs-{name}") for name in pairs if passes[name]}
        with_negatives = frozenset(
            (name, *key) for name, facts in pairs.items() for key, (_, negatives) in facts["sets"].items() if negatives
        )

        def mapper(run: Run, workers: WorkerPlan) -> BatchesMapper:
            shards, sizes = _entry_shards(run.plan, passes), (options.seed, options.global_batch, options.group)
            return BatchesMapper(*sizes, with_negatives, shards, run.columns, storage)

        ends = {entry: [numbers.start, numbers.stop] for entry, numbers in passes.items()}
        job = Job("plan: making batches", {"job": "make batches", "passes": ends, **self.fixed}, mapper)
        planner = FixedPlanner(lambda: _bucket_passes(sources, passes), self.workers)
        return self._run(job, f"batches-{epochs.start}", planner)

    def _run(self, job: Job, name: str, planner: Planner) -> tuple[list[str], list[dict[str, Any]]]:
        """Do the job in folder `name` of the plan: its parts' names, from the plan's folder, and facts, in order."""
        folder = self.folder.below(name)
        parts = require_complete(run_job(job, folder, planner), folder.url).parts
        return [f"{name}/{part.part}" for part in parts], read_facts(folder, parts)


def _passes(streams: Sequence[Stream], epochs: range) -> range:
    """The passes over an entry that begin in these epochs."""
    counts = [max(passes_of(each.weight, epoch) for each in streams) for epoch in (epochs.start, epochs.stop)]
    return range(counts[0] if epochs.start else 0, counts[1])


def _fill(streams: Sequence[Stream], facts: Sequence[Mapping[str, Any]], before: int) -> None:
    """Add the batches of parts to their streams. facts: of each part; before: the number of parts before them."""
    by_set = {(stream.entry, stream.dataset, stream.in_batch): stream for stream in streams}
    for number, each in enumerate(facts, before):
        first = 0
        for one in each["sets"]:
            groups = range(first, first + one["batches"])
            by_set[each["entry"], one["dataset"], one["in_batch"]].add(each["pass"], number, groups)
            first = groups.stop


def _bucket_passes(sources: Mapping[str, Folder], passes: Mapping[str, range]) -> tuple[pa.Table, pa.Schema]:
    """A shard for each pass over each bucket of each entry, pass after pass; the source of its ranges is the entry."""
    tables, schemas, shards = [PLAN_SCHEMA.empty_table()], [], 0
    for entry, folder in sources.items():
        buckets, columns = bucket_plan({entry: folder})
        schemas.append(columns)
        if (ranges := buckets.num_rows * len(passes[entry])) > MAX_RANGES:
            raise UsageError(
                f"{len(passes[entry])} passes over --data {entry} are {ranges:,} ranges to read; a plan "
                f"takes {MAX_RANGES:,}. Lower --epochs to {max(1, math.floor(MAX_RANGES / buckets.num_rows))} or its --weight"
            )
        for _ in passes[entry]:
            tables.append(buckets.set_column(0, "shard", pc.add(buckets["shard"], shards)))
            shards += count_shards(buckets)
    return pa.concat_tables([table.cast(PLAN_SCHEMA) for table in tables]), pa.unify_schemas(schemas)


def _entry_shards(plan: pa.Table, passes: Mapping[str, range]) -> dict[str, EntryShards]:
    """The shards of each entry in the plan that _bucket_passes made."""
    shards = plan.group_by("source", use_threads=False).aggregate([("shard", "min"), ("shard", "max")])
    return {
        row["source"]: EntryShards(
            row["shard_min"],
            (row["shard_max"] + 1 - row["shard_min"]) // len(passes[row["source"]]),
            passes[row["source"]].start,
        )
        for row in shards.to_pylist()
    }

"""The training plan: pairs, or single texts, from many files become global batches in the order in which they are trained on.

    OUTPUT/plan/_run.json         what was asked; another plan is refused
    OUTPUT/plan/dealt-NAME/       a run over the rows of each --data: checked, and dealt into buckets
    OUTPUT/plan/batches-EPOCH/    a run over buckets, once for every pass that the epochs from EPOCH on begin: a row
                                  group a global batch. There are several only where --max-steps cuts the epochs short
    OUTPUT/plan/order.parquet     which row group is the batch of each step; put last

The same command resumes each of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.shards import PLAN_SCHEMA, count_shards
from ...engine.actor_pool import shared_pool
from ...engine.job import Job, RunOptions, carry_out, carry_out_planned, even_rows, require_complete
from ...engine.parts import parquet_bytes
from ...engine.run import Run
from ...engine.run_config import check_same_settings, create_run_config, read_run_config
from ...engine.shuffle import MOST_RANGES, bucket_plan
from ...engine.workers import WorkerOptions, WorkerPlan, beside
from ...errors import UsageError
from ...storage.filesystem import absolute, parse_options
from ...storage.folder import Folder
from .batch_reader import ORDER, SCHEMA
from .batches import BatchesMapper, Set
from .pairs import PartitionPairs
from .schedule import Stream, make_order, passes_of
from .sources import Entry, open_entry, parse_data, parse_weights
from .stats import Counts, check_batches, check_dealt, count, merged, summaries

MOST_BATCH = 65_536  # rows
SHARD_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class DataOptions(WorkerOptions):
    """Which pairs are trained on, and how they are put together."""

    data: tuple[str, ...] = field(
        metadata={
            "help": "Training pairs, as URL or NAME=URL: query, pos, neg, ...; or text alone. Repeat it for more.",
            "many": True,
        }
    )
    weight: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "How often an epoch goes through a --data, or a dataset in it, as NAME=0.5. Default: 1. Repeat it.",
            "many": True,
        },
    )
    global_batch: int = field(metadata={"help": "Rows of a step, over all workers; all of one dataset.", "min": 1})
    group: int = field(metadata={"help": "Passages of a row: a positive, the others negatives.", "min": 1})
    epochs: int = field(default=1, metadata={"help": "Times that training goes through the data.", "min": 1})
    max_steps: int | None = field(default=None, metadata={"help": "Stop the plan after N steps.", "min": 1})
    seed: int = field(default=0, metadata={"help": "Of every shuffle and draw."})


@dataclass(frozen=True)
class Planned:
    """A finished plan: its folder, for order.Order; its steps, and those of an epoch; what it is made of."""

    url: str
    steps: int
    epoch_steps: float
    counts: Counts


@shared_pool()
def plan(options: DataOptions, output: str, storage_option: tuple[str, ...]) -> Planned:
    """Make the plan in OUTPUT/plan, or what is left of it. Raises UsageError, InputError or RunError, see counts too."""
    _check_numbers(options)
    urls, weights = parse_data(options.data), parse_weights(options.weight)
    folder = Folder(absolute(f"{output.rstrip('/')}/plan"), parse_options(storage_option))
    folder.probe()
    entries = [open_entry(name, url, output, storage_option, options) for name, url in urls.items()]
    if not any(entry.by_dataset for entry in entries):
        _check_names(weights, list(urls))
    fixed = _fixed(options, entries, weights)
    if (record := read_run_config(folder)) is not None:
        check_same_settings(folder, record["settings"], fixed)
    dealt = {entry.name: _deal(entry, options) for entry in entries}
    datasets = {name for found in dealt.values() for name, _ in found["sets"]}
    _check_names(weights, [*urls, *sorted(datasets - set(urls))])
    for name, found in dealt.items():
        check_dealt(name, found, options.global_batch)
    # Only now, so that after a mistake that the first map finds the command may be mended in the same place.
    record = create_run_config(folder, {"settings": fixed})
    check_same_settings(folder, record["settings"], fixed)
    streams = [
        Stream(name, dataset, in_batch, weights.get(dataset, weights.get(name, 1.0)))
        for name, found in dealt.items()
        for dataset, in_batch in sorted(found["sets"])
    ]
    order, batched = _order(entries, options, dealt, streams, fixed)
    folder.claim(ORDER, parquet_bytes(order))
    steps = pq.read_metadata(pa.BufferReader(folder.read(ORDER))).num_rows
    epoch_steps = sum(stream.weight * len(stream.batches(0)) for stream in streams)
    return Planned(folder.url, steps, epoch_steps, count(dealt, batched, streams, options.global_batch))


def _check_numbers(options: DataOptions) -> None:
    for name, most in {"global_batch": MOST_BATCH, "group": None, "epochs": None, "max_steps": None}.items():
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
    """What fixes the plan."""
    return {
        **{f"files of {entry.name}": entry.fingerprint for entry in entries},
        **{f"weight of {name}": weight for name, weight in sorted(weights.items())},
        "data": [entry.name for entry in entries],
        **{name: getattr(options, name) for name in ("global_batch", "group", "epochs", "max_steps", "seed")},
    }


def _deal(entry: Entry, options: DataOptions) -> dict[str, Any]:
    """The first map over one entry; what its rows are, see counts.merged."""
    storage, buckets = parse_options(entry.options.storage_option), entry.buckets(options.global_batch)

    def verb(ledger: Run, workers: WorkerPlan) -> PartitionPairs:
        return PartitionPairs(entry.name, options.seed, buckets, entry.by_dataset, entry.columns, entry.odd, storage)

    fixed = {"verb": "deal pairs", "files": entry.fingerprint, "buckets": buckets, "seed": options.seed}
    job = Job(
        said=f"plan: dealing {entry.name}",
        settings=fixed,
        verb=verb,
    )
    done = carry_out(job, entry.options, lambda corpus, workers: even_rows(corpus, workers, SHARD_ROWS))
    parts = require_complete(done, entry.options.output).parts
    return merged(summaries(Folder(absolute(entry.options.output), storage), parts))


def _order(
    entries: Sequence[Entry],
    options: DataOptions,
    dealt: Mapping[str, Mapping[str, Any]],
    streams: Sequence[Stream],
    fixed: Mapping[str, Any],
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The order, and what the parts that it is of say. Fills the streams.

    Where the steps are cut, first the epochs are made that are needed if every row finds a batch, then what is lacking.
    """
    size, most = options.global_batch, options.max_steps
    of_epoch = sum(s.weight * (dealt[s.entry]["sets"][s.dataset, s.in_batch][0] // size) for s in streams)  # at most
    having = frozenset((n, *key) for n, found in dealt.items() for key, (_, having) in found["sets"].items() if having)
    parts: list[str] = []
    batched: list[dict[str, Any]] = []
    order, made = SCHEMA.empty_table(), 0
    while made < options.epochs and (most is None or order.num_rows < most):
        lacking = options.epochs if most is None else math.ceil((most - order.num_rows) / of_epoch)
        epochs = range(made, min(made + lacking, options.epochs))
        passes = {entry.name: _passes([s for s in streams if s.entry == entry.name], epochs) for entry in entries}
        if any(passes.values()):
            names, found = _batch(entries, options, having, epochs, passes, fixed)
            _fill(streams, found, len(parts))
            parts, batched = parts + names, batched + found
        for name, rows in dealt.items():
            check_batches(name, [s for s in streams if s.entry == name], rows, size)
        made = epochs.stop
        order = make_order(streams, parts, made, options.seed, most)
        of_epoch = max(order.num_rows, 1) / made
    return order, batched


def _passes(streams: Sequence[Stream], epochs: range) -> range:
    """The passes over an entry that these epochs take and those before them did not."""
    first, stop = (
        max(passes_of(s.weight, until) for s in streams) if until else 0 for until in (epochs.start, epochs.stop)
    )
    return range(first, stop)


def _fill(streams: Sequence[Stream], found: Sequence[Mapping[str, Any]], before: int) -> None:
    """Tell the streams their batches. found: what each part says; before: how many parts came before them."""
    by_set = {(stream.entry, stream.dataset, stream.in_batch): stream for stream in streams}
    for number, each in enumerate(found, before):
        first = 0
        for one in each["sets"]:
            groups = range(first, first + one["batches"])
            by_set[each["entry"], one["dataset"], one["in_batch"]].add(each["pass"], number, groups)
            first = groups.stop


def _batch(
    entries: Sequence[Entry],
    options: DataOptions,
    having: frozenset[Set],
    epochs: range,
    passes: Mapping[str, range],
    fixed: Mapping[str, Any],
) -> tuple[list[str], list[dict[str, Any]]]:
    """The second map over all buckets: its parts' names, from the plan's folder, and summaries, in order."""
    storage = parse_options(entries[0].options.storage_option)
    sources = {entry.name: Folder(absolute(entry.options.output), storage) for entry in entries if passes[entry.name]}

    def verb(ledger: Run, workers: WorkerPlan) -> BatchesMapper:
        return BatchesMapper(options.seed, options.global_batch, options.group, having, ledger.columns, storage)

    plan, _, _ = entries[0].options.output.rpartition("/")
    name = f"batches-{epochs.start}"
    run = RunOptions(
        input=entries[0].options.input,
        output=f"{plan}/{name}",
        storage_option=entries[0].options.storage_option,
        **beside(options),
    )
    ends = {entry: [numbers.start, numbers.stop] for entry, numbers in passes.items()}
    job = Job(said="plan: making batches", settings={"verb": "make batches", "passes": ends, **fixed}, verb=verb)
    done = require_complete(carry_out_planned(job, run, lambda: _bucket_passes(sources, passes)), run.output)
    found = summaries(Folder(absolute(run.output), storage), done.parts)
    return [f"{name}/{part.part}" for part in done.parts], found


def _bucket_passes(sources: Mapping[str, Folder], passes: Mapping[str, range]) -> tuple[pa.Table, pa.Schema]:
    """A shard for each pass over each bucket of each entry; its slices' names begin ENTRY/BUCKET/PASS."""
    tables, schemas, shards = [PLAN_SCHEMA.empty_table()], [], 0
    for entry, folder in sources.items():
        buckets, columns = bucket_plan({entry: folder})
        schemas.append(columns)
        if (ranges := buckets.num_rows * len(passes[entry])) > MOST_RANGES:
            raise UsageError(
                f"{len(passes[entry])} passes over --data {entry} are {ranges:,} ranges to read; a plan "
                f"takes {MOST_RANGES:,}. Lower --epochs to {max(1, math.floor(MOST_RANGES / buckets.num_rows))} or its --weight"
            )
        parts = pc.replace_substring_regex(buckets["name"], ".*/", "")
        for number in passes[entry]:
            words = [pa.scalar(entry), buckets["shard"].cast(pa.string()), pa.scalar(str(number)), parts]
            named = buckets.set_column(2, "name", pc.binary_join_element_wise(*words, "/"))
            tables.append(named.set_column(0, "shard", pc.add(buckets["shard"], shards)))
            shards += count_shards(buckets)
    return pa.concat_tables([table.cast(PLAN_SCHEMA) for table in tables]), pa.unify_schemas(schemas)

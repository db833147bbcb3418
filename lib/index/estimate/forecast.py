"""The forecast of an index build: shards, bytes, objects, memory and time by stage. Nothing is written.

Shards, segments and samples come from the functions that the stages call, over the input's footers or a corpus that is supposed;
times from what costs.py measures. It is a build from nothing: what an earlier command did is not subtracted.
"""

import re
from collections.abc import Sequence

import pyarrow as pa

from ...cli.units import format_bytes, format_duration
from ...data.corpus import Corpus, list_files, measure
from ...data.formats import Measure
from ...engine.publish import ROW_GROUP
from ...engine.workers import WorkerPlan, connect_for
from ...errors import ShoalError, UsageError
from ...storage.listing import InputFile
from ..build.config import IndexBuild, IndexConfig, check, choose_for
from ..build.vector_source import VectorFormat, describe
from ..kinds import FLAT_LISTS
from .costs import measure_costs
from .stages import Estimator, StageEstimate

PART_BYTES = 128 << 20  # of the files of a supposed corpus: embed_corpus.py's
MAX_ROWS = 10**10  # of a supposed corpus: its shards are planned in memory, one by one
SLICE_BYTES = 350  # of the driver's memory, for a row of a plan
CORES, NODE_CORES = 100, 16  # of the cluster that the hours of a supposed build are for, and of a node of it
HEAD = "stage", "shards", "read", "written", "objects", "memory", "core seconds", "clock"


def forecast(config: IndexConfig) -> list[str]:
    """The lines that `--dry-run` prints. Raises ShoalError for what the build itself would refuse before it computes."""
    return to_lines(foresee(config), config.price_per_hour)


def foresee(config: IndexConfig) -> Estimator:
    """The numbers of a build from nothing. Measuring takes some seconds; the cluster is joined, to see its nodes."""
    options, storage = config.vectors, config.storage.fsspec
    if config.suppose and options.input:
        raise UsageError(
            f"--suppose {config.suppose} and --input {options.input}: a corpus is there or supposed. Give one"
        )
    check(config)
    if config.suppose:
        corpus, format = suppose(config.suppose, options.vector_column)
    else:
        files = list_files(options, storage)
        format = describe(files, options.vector_column, storage)
        corpus = measure(files, options, storage, strict=True)
    choice, rows = choose_for(config, corpus, format), int(corpus.rows)
    build = IndexBuild(config, config.folder, format, choice, rows, config.recall_queries, corpus.id_column, key="")
    connect_for(build.workers)
    return Estimator(build, corpus, measure_costs(build))


def time_of(build: IndexBuild) -> str:
    """The time of an open build, in a sentence; or why it is not known."""
    try:
        result = Estimator(build, build.measure_input(), measure_costs(build))
        clock = clock_of(result.stages)
    except ShoalError as error:
        return f"how long it takes is not known: {error}"
    time = "" if clock is None else f"about {format_duration(clock)} with the workers there are, "
    return f"{time}{_core_hours(result.stages):,.1f} core hours by costs measured here; --dry-run tells them by stage"


def suppose(text: str, column: str) -> tuple[Corpus, VectorFormat]:
    """A corpus of `ROWSxDIM` as embed_corpus.py would write it. Raises UsageError for another text."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise UsageError(f"--suppose {text!r} is not ROWSxDIM. Write it as 1000000000x1024")
    rows, dim = int(match[1]), int(match[2])
    if rows > MAX_ROWS:
        raise UsageError(
            f"--suppose {text}: {MAX_ROWS:,} rows at most. Suppose as many ({MAX_ROWS}x{dim}), and multiply"
        )
    schema = pa.schema([("id", pa.large_string()), (column, pa.list_(pa.float32(), dim))])
    each = max(1, PART_BYTES // (4 * dim))
    counts = [min(each, rows - start) for start in range(0, rows, each)]
    names = [f"part-{number:06d}" for number in range(len(counts))]
    files = [InputFile(name, name, 4 * dim * count, "") for name, count in zip(names, counts, strict=True)]
    breaks = [(*range(ROW_GROUP, count, ROW_GROUP), count) for count in counts]
    measures = [Measure(each[-1], 1.0, True, 4.0 * dim, schema, breaks=each) for each in breaks]
    return Corpus(tuple(files), tuple(measures), schema, "id"), VectorFormat(dim, "float", {}, has_reasons=False)


def clock_of(stages: Sequence[StageEstimate]) -> float | None:
    """Seconds with the cluster's workers; None where a stage has none."""
    plans = [(stage, stage.workers) for stage in stages if isinstance(stage.workers, WorkerPlan)]
    return sum(stage.clock(plan.maximum, plan.threads) for stage, plan in plans) if len(plans) == len(stages) else None


def _core_hours(stages: Sequence[StageEstimate]) -> float:
    return sum(stage.core_seconds for stage in stages) / 3600


def to_lines(result: Estimator, price_per_hour: float | None) -> list[str]:
    """The lines to print."""
    stages, slices = result.stages, max(stage.slices for stage in result.stages)
    return [
        *_index(result),
        *_columns([HEAD, *(_cells(stage.name, [stage]) for stage in stages), _cells("all", stages)]),
        "          memory is of a worker; core seconds are without waits for the store, the clock without the seconds in which "
        "workers start; all are estimates",
        f"driver    {sum(stage.shards for stage in stages):,} shards; of the largest plan {slices:,} rows, about "
        f"{format_bytes(SLICE_BYTES * slices)} of its memory",
        *_workers(stages),
        *_notes(result),
        *([] if price_per_hour is None else [_cost(stages, price_per_hour)]),
    ]


def _index(result: Estimator) -> list[str]:
    build, corpus, segments = result.build, result.corpus, len(result.segments)
    supposed = ", supposed: float32 as embed_corpus.py leaves them" if build.config.suppose else ""
    repeated = segments * result.trained
    return [
        f"plan      {corpus.rows:,.0f} vectors of {build.format.dim:,} dimensions in {len(corpus.files):,} files{supposed}",
        *(f"kind      {sentence}" for sentence in build.choice.why),
        f"index     {format_bytes(build.choice.bytes)} in memory, {build.choice.bytes / corpus.rows:,.1f} bytes a vector; empty, as "
        f"each worker loads it, {format_bytes(result.trained)}",
        f"segments  {segments:,}, {format_bytes(result.codes + repeated)} on disk; {format_bytes(repeated)} of it are centroids and "
        "codec, which every segment repeats",
        f"measured  {_measured(result)}; on one core here, with random vectors",
    ]


def _measured(result: Estimator) -> str:
    """Some of the measured costs."""
    costs, lists = result.costs, result.lists
    encoding = f"encoding {1e6 * costs.rates['encoded']:,.1f} us a vector"
    if not lists:
        return encoding
    graph, assigning = " by their graph, an estimate" * (lists > FLAT_LISTS), 1e6 * costs.seconds(result.assign(1))
    gigaflops = 2e-9 / costs.rates["compared"]
    return f"{encoding}, assigning it to one of {lists:,} lists{graph} {assigning:,.1f} us; k-means {gigaflops:,.0f} GFLOP/s"


def _cells(name: str, stages: Sequence[StageEstimate]) -> tuple[str, ...]:
    """A row of the table, of one or several stages."""
    shards, objects = (f"{sum(getattr(stage, each) for stage in stages):,}" for each in ("shards", "objects"))
    read, written = (format_bytes(sum(getattr(stage, each) for stage in stages)) for each in ("read", "written"))
    memory, seconds = format_bytes(max(stage.memory for stage in stages)), f"{3600 * _core_hours(stages):,.0f}"
    clock = clock_of(stages)
    return name, shards, read, written, objects, memory, seconds, "unknown" if clock is None else format_duration(clock)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _workers(stages: Sequence[StageEstimate]) -> list[str]:
    """The workers of each stage; or why there are none."""
    names: dict[str, list[str]] = {}
    for stage in stages:
        plan = stage.workers
        text = f"none here: {plan}" if isinstance(plan, str) else str(plan.at_most(stage.shards))
        names.setdefault(text, []).append(stage.name)
    return [f"workers   {', '.join(each)}: {text}" for text, each in names.items()]


def _notes(result: Estimator) -> list[str]:
    """More lines, where the command gives cause."""
    config, notes = result.build.config, []
    for merge in (stage for stage in result.stages if stage.name == "merge"):
        disk = format_bytes((merge.read + merge.written) / merge.shards)
        notes.append(f"disk      merging takes {disk} of a node's own disk for each of {merge.shards}")
    if config.exports:
        notes.append(f"exports   {', '.join(config.exports)}: not reckoned here")
    if config.suppose:
        hours = {stage.name: _at_scale(stage) / 3600 for stage in result.stages}
        parts = ", ".join(f"{name} {value:,.2f}" for name, value in hours.items())
        serial = sum(stage.serial_seconds for stage in result.stages) / 3600
        notes.append(
            f"at scale  {sum(hours.values()):,.1f} hours with {CORES} cores, in nodes of {NODE_CORES} ({parts}); "
            f"{_core_hours(result.stages):,.1f} core hours, of which {serial:,.2f} are one core's, while the others wait"
        )
    return notes


def _at_scale(stage: StageEstimate) -> float:
    """Seconds by the clock in a cluster of CORES."""
    return stage.clock(1, NODE_CORES) if stage.whole_node else stage.clock(CORES, 1)


def _cost(stages: Sequence[StageEstimate], price: float) -> str:
    """Dollars of all workers from first to last; or, where there are none here, of the hours of cores."""
    clock, dollars, workers = clock_of(stages), _core_hours(stages) * price, "a worker being a core that is never idle"
    if clock is not None:
        most = max(stage.workers.maximum for stage in stages if isinstance(stage.workers, WorkerPlan))
        dollars, workers = clock / 3600 * most * price, f"{most:,} workers"
    return f"cost      about ${dollars:,.2f} at ${price:g} a worker-hour, {workers}"

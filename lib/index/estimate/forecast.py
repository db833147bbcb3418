"""The forecast of an index build: shards, bytes, objects, memory and time by stage. Nothing is written.

Shards, segments and samples come from the functions that the stages call, over the input's footers or a corpus that is supposed;
times from what costs.py measures. It is a build from nothing: what an earlier command did is not subtracted.
"""

import re
from dataclasses import dataclass

import pyarrow as pa

from ...cli.units import format_bytes, format_duration
from ...data.corpus import Corpus, list_files, measure
from ...data.formats import Measure
from ...engine.parts import ROW_GROUP
from ...engine.workers import WorkerPlan, connect_for
from ...errors import ShoalError, UsageError
from ...storage.listing import InputFile
from ..build.config import IndexBuild, IndexConfig, check, choose_for
from ..build.segments import segments_for
from ..build.train import TrainPlan
from ..build.vector_source import VectorFormat, describe
from .costs import measure_costs
from .stages import Estimator, StageEstimate

PART_BYTES = 128 << 20  # of the files of a supposed corpus: embed_corpus.py's
MAX_ROWS = 10**10  # of a supposed corpus: its shards are planned in memory, one by one
SLICE_BYTES = 350  # of the driver's memory, for a row of a plan
CORES, NODE_CORES = 100, 16  # of the cluster that the hours of a supposed build are for, and of a node of it
HEAD = "stage", "shards", "read", "written", "objects", "memory", "core seconds", "clock"


@dataclass(frozen=True)
class Forecast:
    """A build in numbers. segments: bytes of each."""

    inputs: Estimator
    stages: list[StageEstimate]
    segments: list[float]

    @property
    def seconds(self) -> float | None:
        """By the clock, with the cluster's workers; None where a stage has none."""
        clocks = [stage.current_clock for stage in self.stages]
        return None if None in clocks else sum(filter(None, clocks))

    @property
    def core_seconds(self) -> float:
        return sum(stage.core_seconds for stage in self.stages)

    @property
    def time(self) -> str:
        """In a sentence."""
        clock = "" if self.seconds is None else f"about {format_duration(self.seconds)} with the workers there are, "
        return (
            f"{clock}{self.core_seconds / 3600:,.1f} core hours by costs measured here; --dry-run tells them by stage"
        )

    def lines(self, price_per_hour: float | None) -> list[str]:
        """The lines to print."""
        inputs, slices = self.inputs, max(stage.slices for stage in self.stages)
        measured = inputs.costs.lines(inputs.lists, inputs.build.config.recall_queries)
        return [
            *self._about(),
            *(f"measured  {sentence}" for sentence in measured),
            f"          all of it on one core here, with {inputs.costs.rows:,} random vectors",
            *_columns([HEAD, *map(_cells, self.stages), self._total()]),
            "          memory is of a worker; core seconds are without waits for the store, the clock without the seconds in which "
            "workers start; all are estimates",
            f"driver    {sum(stage.shards for stage in self.stages):,} shards; of the largest plan {slices:,} rows, about "
            f"{format_bytes(SLICE_BYTES * slices)} of its memory",
            *self._workers(),
            *self._notes(),
            *([] if price_per_hour is None else [self._cost(price_per_hour)]),
        ]

    def _about(self) -> list[str]:
        build, corpus, choice, trained = (
            self.inputs.build,
            self.inputs.corpus,
            self.inputs.build.choice,
            self.inputs.trained,
        )
        supposed = ", supposed: float32 as embed_corpus.py leaves them" if build.config.suppose else ""
        return [
            f"plan      {corpus.rows:,.0f} vectors of {build.format.dim:,} dimensions in {len(corpus.files):,} files{supposed}",
            *(f"kind      {sentence}" for sentence in choice.why),
            f"index     {format_bytes(choice.bytes)} in memory, {choice.bytes / corpus.rows:,.1f} bytes a vector; empty, as each "
            f"worker loads it, {format_bytes(trained)}",
            f"segments  {len(self.segments):,}, {format_bytes(sum(self.segments))} on disk; "
            f"{format_bytes(len(self.segments) * trained)} of it are centroids and codec, which every segment repeats",
        ]

    def _total(self) -> tuple[str, ...]:
        objects, shards = sum(stage.objects for stage in self.stages), sum(stage.shards for stage in self.stages)
        sizes = [format_bytes(sum(getattr(stage, name) for stage in self.stages)) for name in ("read", "written")]
        memory = format_bytes(max(stage.memory for stage in self.stages))
        return (
            "all",
            f"{shards:,}",
            *sizes,
            f"{objects:,}",
            memory,
            f"{self.core_seconds:,.0f}",
            _duration(self.seconds),
        )

    def _workers(self) -> list[str]:
        """The workers of each stage; or why there are none."""
        stages: dict[str, list[str]] = {}
        for stage in self.stages:
            plan = stage.workers
            text = f"none here: {plan}" if isinstance(plan, str) else str(plan.at_most(stage.shards))
            stages.setdefault(text, []).append(stage.name)
        return [f"workers   {', '.join(names)}: {text}" for text, names in stages.items()]

    def _notes(self) -> list[str]:
        """More lines, where the command gives cause."""
        config, notes = self.inputs.build.config, []
        for stage in self.stages:
            if stage.name == "merge":
                disk = format_bytes((stage.read + stage.written) / stage.shards)
                notes.append(f"disk      merging takes {disk} of a node's own disk for each of {stage.shards}")
        if config.exports:
            notes.append(f"exports   {', '.join(config.exports)}: not reckoned here")
        if config.suppose:
            hours = {stage.name: _at_scale(stage) / 3600 for stage in self.stages}
            parts = ", ".join(f"{name} {value:,.2f}" for name, value in hours.items())
            serial = sum(stage.serial_seconds for stage in self.stages)
            notes.append(
                f"at scale  {sum(hours.values()):,.1f} hours with {CORES} cores, in nodes of {NODE_CORES} ({parts}); "
                f"{self.core_seconds / 3600:,.1f} core hours, of which {serial / 3600:,.2f} are one core's, while the others wait"
            )
        return notes

    def _cost(self, price: float) -> str:
        """Dollars of all workers from first to last; or, where there are none here, of the hours of cores."""
        plans = [stage.workers for stage in self.stages if isinstance(stage.workers, WorkerPlan)]
        if self.seconds is None or not plans:
            dollars = self.core_seconds / 3600 * price
            return (
                f"cost      about ${dollars:,.2f} at ${price:g} a worker-hour, a worker being a core that is never idle"
            )
        most = max(plan.maximum for plan in plans)
        dollars = self.seconds / 3600 * most * price
        return f"cost      about ${dollars:,.2f} at ${price:g} a worker-hour, {most:,} workers"


def forecast(config: IndexConfig) -> list[str]:
    """The lines that `--dry-run` prints. Raises ShoalError for what the build itself would refuse before it computes."""
    return foresee(config).lines(config.price_per_hour)


def foresee(config: IndexConfig) -> Forecast:
    """The numbers of a build from nothing. Measuring takes some seconds; the cluster is joined, to see its nodes."""
    if config.suppose and config.vectors.input:
        raise UsageError(
            f"--suppose {config.suppose} and --input {config.vectors.input}: a corpus is there or supposed. Give one"
        )
    check(config)
    options = config.vectors
    corpus, format = suppose(config.suppose, options.vector_column) if config.suppose else _measure_input(config)
    choice, rows = choose_for(config, corpus, format), int(corpus.rows)
    build = IndexBuild(config, config.folder, format, choice, rows, config.recall_queries, corpus.id_column, key="")
    connect_for(build.workers)
    return estimate(build, corpus)


def time_of(build: IndexBuild) -> str:
    """The time of an open build, in a sentence; or why it is not known."""
    try:
        return estimate(build, build.measure_input()).time
    except ShoalError as error:
        return f"how long it takes is not known: {error}"


def estimate(build: IndexBuild, corpus: Corpus) -> Forecast:
    """The numbers of an open build."""
    config, lists, dim = build.config, build.choice.lists, build.format.dim
    segments = segments_for(corpus.rows * build.row_bytes, 4.0 * lists * dim, config.merge or 1)
    plan = TrainPlan(build.kind, dim, lists, config.metric)
    estimator = Estimator(build, corpus, measure_costs(plan, build.format.type, lists * segments / corpus.rows))
    return Forecast(estimator, *estimator.stages())


def _measure_input(config: IndexConfig) -> tuple[Corpus, VectorFormat]:
    """The input, by its footers."""
    options, storage = config.vectors, config.storage.fsspec
    files = list_files(options, storage)
    format = describe(files, options.vector_column, storage)
    return measure(files, options, storage, strict=True), format


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
    files, measures = [], []
    for number, start in enumerate(range(0, rows, each)):
        count = min(each, rows - start)
        breaks = (*range(ROW_GROUP, count, ROW_GROUP), count)
        files.append(InputFile(f"part-{number:06d}", f"part-{number:06d}", 4 * dim * count, ""))
        measures.append(Measure(count, 1.0, True, 4.0 * dim, schema, breaks=breaks))
    return Corpus(tuple(files), tuple(measures), schema, "id"), VectorFormat(dim, "float", {}, has_reasons=False)


def _cells(stage: StageEstimate) -> tuple[str, ...]:
    """A stage's row of the table."""
    sizes = format_bytes(stage.read), format_bytes(stage.written), f"{stage.objects:,}", format_bytes(stage.memory)
    return stage.name, f"{stage.shards:,}", *sizes, f"{stage.core_seconds:,.0f}", _duration(stage.current_clock)


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else format_duration(seconds)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]


def _at_scale(stage: StageEstimate) -> float:
    """Seconds by the clock in a cluster of CORES."""
    return stage.clock(1, NODE_CORES) if stage.whole_node else stage.clock(CORES, 1)

"""What an index build would be, before it is: shards, bytes, objects, memory and time by stage. Nothing is written.

Shards, pieces and samples come of the functions that the stages call, over the input's footers or a corpus that is supposed;
times of what costs.py measures, multiplied. It is a build from nothing: what an earlier command did is not taken off.
"""

import re
from dataclasses import dataclass, replace

import pyarrow as pa

from ...cli.units import format_bytes, format_duration
from ...data.corpus import Corpus, list_files, measure
from ...data.formats import Measure
from ...engine.parts import ROW_GROUP
from ...engine.workers import WorkerPlan, WorkerRequest, connect_for, largest_node_cpus
from ...errors import RunError, ShoalError, UsageError
from ...storage.listing import InputFile
from ..build.config import IndexBuild, IndexConfig, check, choose_for
from ..build.segments import segments_for
from ..build.vector_source import VectorFormat, describe
from ..kinds import ID_BYTES
from .costs import measure_costs
from .stage import EstimateInputs, StageEstimate
from .stages import stages_of

PART_BYTES = 128 << 20  # of the files of a supposed corpus: embed_corpus.py's
MOST_ROWS = 10**10  # that are supposed: their shards are planned in memory, one by one
SLICE_BYTES = 350  # of the driver's memory (lib/sharded.py)
CORES, NODE_CORES = 100, 16  # of the cluster that a supposed build's hours are told for, and of a node of it
HEAD = "stage", "shards", "read", "written", "objects", "memory", "core seconds", "clock"


@dataclass(frozen=True)
class Forecast:
    """A build in numbers. pieces: bytes of each."""

    given: EstimateInputs
    stages: list[StageEstimate]
    pieces: list[float]

    @property
    def seconds(self) -> float | None:
        """By the clock, with the workers there are; None where a stage has none."""
        clocks = [stage.here for stage in self.stages]
        return None if None in clocks else sum(filter(None, clocks))

    @property
    def core_seconds(self) -> float:
        return sum(stage.seconds + stage.alone for stage in self.stages)

    @property
    def time(self) -> str:
        """In a sentence."""
        clock = "" if self.seconds is None else f"about {format_duration(self.seconds)} with the workers there are, "
        return (
            f"{clock}{self.core_seconds / 3600:,.1f} core hours by costs measured here; --dry-run tells them by stage"
        )

    def lines(self, price_per_hour: float | None) -> list[str]:
        """What is printed."""
        config, slices = self.given.build.config, max(stage.slices for stage in self.stages)
        said = [
            *self._about(),
            *(f"measured  {sentence}" for sentence in self.given.costs.lines(self.given.lists, config.recall_queries)),
            f"          all of it on one core here, with {self.given.costs.rows:,} random vectors",
            *_columns([HEAD, *map(_row, self.stages), self._total()]),
            "          memory is of a worker; core seconds are without waits for the store, the clock without the seconds in which "
            "workers start; all are estimates",
            f"driver    {sum(stage.shards for stage in self.stages):,} shards; of the largest plan {slices:,} rows, about "
            f"{format_bytes(SLICE_BYTES * slices)} of its memory",
            *self._workers(),
            *self._beside(),
        ]
        return said if price_per_hour is None else [*said, self._cost(price_per_hour)]

    def _about(self) -> list[str]:
        build, corpus, choice = self.given.build, self.given.corpus, self.given.build.choice
        supposed = ", supposed: float32 as embed_corpus.py leaves them" if build.config.suppose else ""
        return [
            f"plan      {corpus.rows:,.0f} vectors of {build.format.dim:,} dimensions in {len(corpus.files):,} files{supposed}",
            *(f"kind      {sentence}" for sentence in choice.why),
            f"index     {format_bytes(choice.bytes)} in memory, {choice.bytes / corpus.rows:,.1f} bytes a vector; empty, as each "
            f"worker loads it, {format_bytes(self.given.trained)}",
            f"pieces    {len(self.pieces):,}, {format_bytes(sum(self.pieces))} on disk; "
            f"{format_bytes(len(self.pieces) * self.given.trained)} of it are centroids and codec, which every piece repeats",
        ]

    def _total(self) -> tuple[str, ...]:
        objects, shards = sum(stage.objects for stage in self.stages), sum(stage.shards for stage in self.stages)
        sizes = [format_bytes(sum(getattr(stage, name) for stage in self.stages)) for name in ("read", "written")]
        most = format_bytes(max(stage.memory for stage in self.stages))
        clock = "unknown" if self.seconds is None else format_duration(self.seconds)
        return "all", f"{shards:,}", *sizes, f"{objects:,}", most, f"{self.core_seconds:,.0f}", clock

    def _workers(self) -> list[str]:
        """Which workers do which stages; or why there are none."""
        by: dict[str, list[str]] = {}
        for stage in self.stages:
            by.setdefault(_crew(stage), []).append(stage.name)
        return [f"workers   {', '.join(names)}: {crew}" for crew, names in by.items()]

    def _beside(self) -> list[str]:
        """What is to be known besides, where the command gives cause."""
        config, said = self.given.build.config, []
        for stage in self.stages:
            if stage.name == "merge":
                disk = format_bytes(stage.read / stage.shards + stage.written / stage.shards)
                said.append(f"disk      merging takes {disk} of a node's own disk for each of {stage.shards}")
        if config.exports:
            said.append(f"exports   {', '.join(config.exports)}: not reckoned here")
        if config.suppose:
            hours = {each.name: _elsewhere(each) / 3600 for each in self.stages}
            parts = ", ".join(f"{name} {value:,.2f}" for name, value in hours.items())
            said.append(
                f"at scale  {sum(hours.values()):,.1f} hours with {CORES} cores, in nodes of {NODE_CORES} ({parts}); "
                f"{self.core_seconds / 3600:,.1f} core hours, of which {sum(stage.alone for stage in self.stages) / 3600:,.2f} are "
                "one core's, while the others wait"
            )
        return said

    def _cost(self, price: float) -> str:
        """Dollars of all workers from first to last; or, where there are none here, of the hours of cores."""
        crews = [stage.workers for stage in self.stages if isinstance(stage.workers, WorkerPlan)]
        if self.seconds is None or not crews:
            dollars = self.core_seconds / 3600 * price
            return (
                f"cost      about ${dollars:,.2f} at ${price:g} a worker-hour, a worker being a core that is never idle"
            )
        most = max(crew.maximum for crew in crews)
        return (
            f"cost      about ${self.seconds / 3600 * most * price:,.2f} at ${price:g} a worker-hour, {most:,} workers"
        )


def forecast(config: IndexConfig) -> list[str]:
    """The lines that `--dry-run` prints. Raises ShoalError for what the build itself would refuse before it computes."""
    return foresee(config).lines(config.price_per_hour)


def foresee(config: IndexConfig) -> Forecast:
    """The numbers of a build from nothing: some seconds of measuring, and the cluster is asked for its nodes."""
    if config.suppose and config.vectors.input:
        raise UsageError(
            f"--suppose {config.suppose} and --input {config.vectors.input}: a corpus is there or supposed. Give one"
        )
    check(config)
    corpus, vectors = supposed(config.suppose, config.vectors.vector_column) if config.suppose else _found(config)
    choice = choose_for(config, corpus, vectors)
    build = IndexBuild(
        config, config.folder, vectors, choice, int(corpus.rows), config.recall_queries, corpus.id_column, key=""
    )
    connect_for(build.workers)
    return reckon(build, corpus)


def time_of(build: IndexBuild) -> str:
    """How long a build that is open takes, in a sentence; why that cannot be told, where it cannot."""
    try:
        return reckon(build, build.measure_input()).time
    except ShoalError as error:
        return f"how long it takes is not known: {error}"


def reckon(build: IndexBuild, corpus: Corpus) -> Forecast:
    """The numbers of an open build, as it was chosen."""
    config, choice, dim = build.config, build.choice, build.format.dim

    def find(weight_bytes: float, node: bool) -> WorkerPlan | str:
        workers = build.workers
        if node:
            cpus = largest_node_cpus(workers)
            workers = replace(workers, cpus_per_worker=cpus, max_workers=1, min_workers=1)
        try:
            return WorkerRequest(workers, int(weight_bytes)).resolve()
        except RunError as error:
            return str(error)

    codes = corpus.rows * (choice.kind.bytes(dim) + ID_BYTES)
    row_lists = choice.lists * segments_for(codes, 4.0 * choice.lists * dim, config.merge or 1) / corpus.rows
    costs = measure_costs(choice.kind, dim, choice.lists, config.metric, build.format.type, row_lists)
    given = EstimateInputs(build, corpus, costs, find)
    return Forecast(given, *stages_of(given))


def _found(config: IndexConfig) -> tuple[Corpus, VectorFormat]:
    """The input, by its footers."""
    options, storage = config.vectors, config.storage.fsspec
    files = list_files(options, storage)
    vectors = describe(files, options.vector_column, storage)
    return measure(files, options, storage, strict=True), vectors


def supposed(text: str, column: str) -> tuple[Corpus, VectorFormat]:
    """A corpus of `ROWSxDIM` as embed_corpus.py would leave it. Raises UsageError for another text."""
    found = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if found is None:
        raise UsageError(f"--suppose {text!r} is not ROWSxDIM. Write it as 1000000000x1024")
    rows, dim = int(found[1]), int(found[2])
    if rows > MOST_ROWS:
        raise UsageError(
            f"--suppose {text}: {MOST_ROWS:,} rows at most. Suppose as many ({MOST_ROWS}x{dim}), and multiply"
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


def _row(stage: StageEstimate) -> tuple[str, ...]:
    clock = "unknown" if stage.here is None else format_duration(stage.here)
    sizes = format_bytes(stage.read), format_bytes(stage.written), f"{stage.objects:,}", format_bytes(stage.memory)
    return stage.name, f"{stage.shards:,}", *sizes, f"{stage.seconds + stage.alone:,.0f}", clock


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    ]


def _crew(stage: StageEstimate) -> str:
    return f"none here: {stage.workers}" if isinstance(stage.workers, str) else str(stage.workers.at_most(stage.shards))


def _elsewhere(stage: StageEstimate) -> float:
    """Seconds by the clock in the cluster that hours are told for."""
    return stage.clock(1, NODE_CORES) if stage.node else stage.clock(CORES, 1)

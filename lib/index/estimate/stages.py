"""The stages of a build that does not exist yet, in numbers: from the functions that plan them, and from measured costs.

Memory is what a stage is known to need, beside WORKER_BASE: an estimate. So are the seconds.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.corpus import Corpus
from ...data.formats import Measure
from ...data.formats.parquet import ROWS_PER_TABLE
from ...data.shards import cut_shards
from ...engine.parts import Part
from ...engine.workers import WORKER_BASE, WorkerPlan, WorkerRequest
from ...errors import InputError, RunError
from ..build.config import IndexBuild
from ..build.kmeans import COPIED, ITERATIONS, MOST_POINTS
from ..build.recall import MAX_CUT
from ..build.recall_job import levels_of_lists
from ..build.sample import sample_plan, sample_sizes
from ..build.segments import group_parts, merge_memory, segment_memory
from ..build.segments_job import balance, encode_shard_rows
from ..build.stage_parts import rows_of_shards
from ..build.train import MIN_POINTS, TwoLevels, training_bytes
from ..build.train_job import has_two_levels, one_worker, wanted_rows
from ..build.vector_source import SHARD_BYTES
from ..kinds import search_parameter_values
from .costs import Costs

DRIVER_SECONDS = 0.0015  # a shard: 1.0 and 1.1 ms were measured with 2 and 24 workers
RUN_OBJECTS = 3  # of each stage: its settings, its plan, its manifest
CARD_OBJECTS = 3  # card.json, README.md, curve.svg
READ_COPIES = 3  # of vectors that are read: as stored, as numbers, rotated
LIST_ROW_BYTES = 8 + 4 + 4 + 4  # in memory: a number, a score, a value of the search parameter, a query
MERGE_PASSES = 3  # over a segment's bytes: downloaded, copied list by list, uploaded


@dataclass(frozen=True)
class StageEstimate:
    """A stage in numbers.

    slices: rows of the plan. read, written: bytes. memory: of a worker, bytes. workers: the cluster's, or why there are none.
    seconds: of cores, over all shards. serial_seconds: of one core, while the others wait. other_objects: beside parts and run.
    whole_node: its one worker takes all cores of a node.
    """

    name: str
    shards: int
    slices: int
    read: float
    written: float
    memory: float
    seconds: float
    workers: WorkerPlan | str
    other_objects: int = 0
    serial_seconds: float = 0.0
    whole_node: bool = False

    @property
    def objects(self) -> int:
        return self.shards + RUN_OBJECTS + self.other_objects

    @property
    def core_seconds(self) -> float:
        return self.seconds + self.serial_seconds

    def clock(self, workers: int, threads: int) -> float:
        """Seconds from the first shard to the last, with so many workers of so many cores."""
        rounds = math.ceil(self.shards / workers)
        return max(rounds * self.seconds / self.shards / threads, DRIVER_SECONDS * self.shards) + self.serial_seconds

    @property
    def current_clock(self) -> float | None:
        """The same with the cluster's workers."""
        return None if isinstance(self.workers, str) else self.clock(self.workers.maximum, self.workers.threads)


@dataclass(frozen=True)
class Estimator:
    """Estimates each stage of a build of the corpus."""

    build: IndexBuild
    corpus: Corpus
    costs: Costs

    @property
    def lists(self) -> int:
        return self.build.choice.lists

    @property
    def dim(self) -> int:
        return self.build.format.dim

    @property
    def trained(self) -> int:
        """Bytes of the empty index."""
        return int(self.costs.codec_bytes + self.costs.lookup.centroid_bytes * self.lists)

    def stages(self) -> tuple[list[StageEstimate], list[float]]:
        """Every stage in order, and the bytes of each segment. Raises InputError for a sample that is too small to train on."""
        config = self.build.config
        sample, sampled = self.sample()
        encode, rows = self.encode()
        parts = [Part(number, "", 0, 0, "", count, count, 0, 0, 0) for number, count in enumerate(rows.tolist())]
        groups = group_parts(parts, self.build.row_bytes, self.trained, config.merge or 1)
        segments = [sum(part.rows for part in group) for group in groups]
        merges = [self.merge(segments)] if config.merge else []
        measures = [*self.probe(segments), *self.exact(encode, int(rows.max()))]
        stages = [sample, *self.train(sampled), encode, self.segments(segments, len(parts)), *merges, *measures]
        return stages, [count * self.build.row_bytes + self.trained for count in segments]

    def sample(self) -> tuple[StageEstimate, np.ndarray]:
        """Also returns the vectors to train on of each part."""
        wanted, held_out = wanted_rows(self.build), self.build.held_out
        plan = sample_plan(self.corpus, wanted + held_out, self.dim)
        rows = rows_of_shards(plan)
        kept, sampled = sample_sizes(rows, -(-wanted // len(rows)), -(-held_out // len(rows)))
        read, written = self._decoded(plan), float((sampled + kept).sum() * 4 * self.dim)
        stage = StageEstimate(
            name="sample",
            shards=len(rows),
            slices=plan.num_rows,
            read=read,
            written=written,
            memory=WORKER_BASE + READ_COPIES * SHARD_BYTES,
            seconds=read * self.costs.read + written * self.costs.write,
            workers=self._workers(0),
            other_objects=1,  # the settings of the build
        )
        return stage, sampled

    def train(self, sampled: np.ndarray) -> list[StageEstimate]:
        """One k-means over the sample; or two levels of k-means, and then the codec alone. sampled: rows of each part."""
        costs, rows, lists = self.costs, int(sampled.sum()), self.lists
        if rows < MIN_POINTS * lists:
            raise InputError(
                f"{rows:,} vectors to train on are too few for {lists:,} lists ({MIN_POINTS} a list). Ask for --lists "
                f"{max(1, rows // MIN_POINTS):,} or fewer, or a larger --sample-rows"
            )
        two_levels = has_two_levels(lists)
        levels = TwoLevels(lists, self.dim, len(sampled), rows)
        parts = sampled[:: levels.codec_stride] if two_levels else sampled
        taken, centroids = float(parts.sum()), lists * 4.0 * self.dim * two_levels
        coded = min(taken, costs.codec_rows)
        seconds = (
            coded / costs.codec_rows * costs.codec + coded * costs.lookup.assign(lists) * self.build.kind.has_lists
        )
        last = self._on_one_node(
            name="train",
            parts=parts,
            read=centroids,
            written=self.trained,
            seconds=seconds + (0.0 if two_levels else self._kmeans(rows, lists)),
            memory=2 * self.trained + centroids,
            serial_seconds=lists * costs.lookup.link * costs.lookup.growth(lists) if two_levels else 0.0,
        )
        return [*self.two_levels(sampled, levels), last] if two_levels else [last]

    def two_levels(self, sampled: np.ndarray, levels: TwoLevels) -> list[StageEstimate]:
        """Cells of a part of the sample, the sample partitioned by cell, and k-means in each cell."""
        costs, vector, cells = self.costs, 4 * self.dim, levels.cells
        parts, points = -(-levels.parts // levels.parts_a_shard), sampled[:: levels.cells_stride]
        size, each = float(levels.rows * vector), levels.rows / cells
        comparing = levels.rows * cells * self.dim * costs.lookup.product
        partition = StageEstimate(
            name="train: partition",
            shards=parts,
            slices=levels.parts,
            read=size,
            written=size,
            memory=WORKER_BASE + READ_COPIES * float(sampled.max()) * levels.parts_a_shard * vector,
            seconds=size * (costs.read + costs.write) + comparing,
            workers=self._workers(0),
        )
        centroids = StageEstimate(
            name="train: centroids",
            shards=cells,
            slices=cells * parts,  # a range of rows in each partitioned part
            read=size,
            written=float(self.lists * vector),
            memory=WORKER_BASE + (READ_COPIES + COPIED) * each * vector,
            seconds=size * costs.read + cells * self._kmeans(each, self.lists / cells),
            workers=partition.workers,
        )
        kmeans = self._kmeans(float(points.sum()), cells)
        return [self._on_one_node("train: cells", points, 0.0, float(cells * vector), kmeans), partition, centroids]

    def encode(self) -> tuple[StageEstimate, np.ndarray]:
        """Also returns the rows of each shard."""
        costs, corpus, vectors = self.costs, self.corpus, self.build.config.vectors
        workers = self._workers(2 * self.trained)
        count = 1 if isinstance(workers, str) else workers.maximum
        plan = cut_shards(corpus, vectors.shard_rows or encode_shard_rows(corpus, count, self.dim))
        rows, read = rows_of_shards(plan), self._decoded(plan)
        stored = self.dim * pa.type_for_alias(self.build.format.type).bit_width / 8
        kept = max(0.0, corpus.row_bytes - stored) if vectors.keep_columns else 0.0
        assigning = costs.lookup.assign(self.lists) * self.build.kind.has_lists
        batch = min(ROWS_PER_TABLE, int(rows.max())) * 4 * self.dim
        stage = StageEstimate(
            name="encode",
            shards=len(rows),
            slices=plan.num_rows,
            read=read,
            written=corpus.rows * (costs.row_bytes + kept),
            memory=WORKER_BASE + 2 * (self.trained + float(rows.max()) * costs.row_bytes) + READ_COPIES * batch,
            seconds=read * costs.read + corpus.rows * (assigning + costs.encode + costs.write_row),
            workers=workers,
        )
        return stage, rows

    def segments(self, segments: Sequence[int], parts: int) -> StageEstimate:
        """segments: rows of each."""
        codes, repeated = self.corpus.rows * self.build.row_bytes, float(len(segments) * self.trained)
        largest = max(segments) * self.build.row_bytes
        return StageEstimate(
            name="segments",
            shards=len(segments),
            slices=parts,
            read=codes,
            written=codes + repeated,
            memory=WORKER_BASE + 2 * (self.trained + largest),  # a list of codes doubles as it grows
            seconds=self.corpus.rows * self.costs.fill * self._depth(max(segments)) + repeated * self.costs.repeat,
            workers=self._workers(segment_memory(largest, self.trained)),
            other_objects=len(segments) + 1,  # the manifest
        )

    def merge(self, segments: Sequence[int]) -> StageEstimate:
        groups = balance([{"vectors": rows} for rows in segments], self.build.config.merge or 1)
        codes, count = self.corpus.rows * self.build.row_bytes, len(groups)
        read, weight = (
            codes + len(segments) * self.trained,
            merge_memory(self.trained, self.lists, max(map(len, groups))),
        )
        return StageEstimate(
            name="merge",
            shards=count,
            slices=len(segments),
            read=read,
            written=codes + count * self.trained,
            memory=WORKER_BASE + weight,
            seconds=MERGE_PASSES * read * self.costs.write,
            workers=self._workers(weight),
            other_objects=2 * count,  # an index and its lists
        )

    def probe(self, segments: Sequence[int]) -> list[StageEstimate]:
        """The search of the segments at every value of the search parameter."""
        costs, kind, rows, queries = self.costs, self.build.kind, self.corpus.rows, self.build.config.recall_queries
        values = search_parameter_values(kind, self.lists)
        list_rows = queries * (MAX_CUT + 1) * len(values)
        if kind.has_lists:
            looking = len(segments) * sum(costs.lookup.probe(self.lists, nprobe) for nprobe in values)
            seconds = queries * (looking + sum(values) / self.lists * rows * costs.scan)
        else:
            scanned = len(segments) * self._depth(max(segments)) if kind.search_parameter else rows
            seconds = queries * scanned * costs.scan
        stage = StageEstimate(
            name="measure: probe",
            shards=len(segments),
            slices=len(segments),
            read=rows * self.build.row_bytes + len(segments) * self.trained,
            written=len(segments) * list_rows * costs.list_bytes,
            memory=WORKER_BASE + self.trained + list_rows * LIST_ROW_BYTES,
            seconds=seconds + len(segments) * list_rows * costs.list_write,
            workers=self._workers(self.trained),
            other_objects=CARD_OBJECTS,
        )
        return self._with_merges(stage, list_rows)

    def exact(self, encode: StageEstimate, largest: int) -> list[StageEstimate]:
        """Exact search of the queries over all vectors, in the shards of the encoding. largest: rows of a shard."""
        costs, queries = self.costs, self.build.config.recall_queries
        list_rows = queries * (MAX_CUT + 1)
        searching = self.corpus.rows * queries * costs.exact + encode.shards * list_rows * costs.list_write
        stage = StageEstimate(
            name="measure: exact",
            shards=encode.shards,
            slices=encode.slices,
            read=encode.read,
            written=encode.shards * list_rows * costs.list_bytes,
            memory=WORKER_BASE + (READ_COPIES + 1) * largest * 4 * self.dim,
            seconds=encode.read * costs.read + searching,
            workers=self._workers(0),
            other_objects=2,  # the queries, and the pairs in the segments' lists
        )
        return self._with_merges(stage, list_rows)

    def _with_merges(self, stage: StageEstimate, list_rows: int) -> list[StageEstimate]:
        """A stage whose parts have lists of so many rows, and the stages that merge these until the driver can read them."""
        costs, stages, levels = self.costs, [stage], levels_of_lists(stage.shards)
        for level, (before, after) in enumerate(pairwise(levels)):
            merge = StageEstimate(
                name=f"{stage.name} lists" + (f", {level + 1}" if level else ""),
                shards=after,
                slices=before,
                read=before * list_rows * costs.list_bytes,
                written=after * list_rows * costs.list_bytes,
                memory=WORKER_BASE + READ_COPIES * list_rows * LIST_ROW_BYTES,
                seconds=before * list_rows * costs.list_merge + after * list_rows * costs.list_write,
                workers=stage.workers,
            )
            stages.append(merge)
        stages[-1] = replace(stages[-1], serial_seconds=levels[-1] * list_rows * costs.list_merge)
        return stages

    def _on_one_node(
        self,
        name: str,
        parts: np.ndarray,
        read: float,
        written: float,
        seconds: float,
        memory: float = 0.0,
        serial_seconds: float = 0.0,
    ) -> StageEstimate:
        """A stage of one shard, which reads parts of the sample. parts: rows of each. read, memory: beside them."""
        size = float(parts.sum()) * 4 * self.dim
        weight = training_bytes(float(parts.sum()), self.dim)
        return StageEstimate(
            name=name,
            shards=1,
            slices=len(parts),
            read=size + read,
            written=written,
            memory=WORKER_BASE + weight + memory,
            seconds=size * self.costs.read + seconds,
            workers=self._workers(weight, whole_node=True),
            other_objects=1,  # the cells, or the trained index
            serial_seconds=serial_seconds,
            whole_node=True,
        )

    def _workers(self, weight_bytes: float, whole_node: bool = False) -> WorkerPlan | str:
        try:
            options = one_worker(self.build) if whole_node else self.build.workers
            return WorkerRequest(options, int(weight_bytes)).resolve()
        except RunError as error:
            return str(error)

    def _kmeans(self, points: float, count: float) -> float:
        """Seconds of k-means, at most: of vectors that differ in all dimensions."""
        return ITERATIONS * min(points, MOST_POINTS * count) * count * self.dim * self.costs.lookup.product

    def _depth(self, rows: int) -> float:
        """The cost of a vector in a graph of so many rows over the measured one; 1 for kinds without a graph of vectors."""
        if self.build.kind.has_lists or not self.build.kind.search_parameter:
            return 1.0
        return max(1.0, math.log(max(rows, 2)) / math.log(self.costs.rows))

    def _decoded(self, plan: pa.Table) -> float:
        """Bytes that a plan's shards read: a row group is decoded from its beginning to the last row that is wanted."""
        pairs = zip(self.corpus.files, self.corpus.measures, strict=True)
        breaks = {file.path: (0, *each.breaks) for file, each in pairs if isinstance(each, Measure)}
        starts = zip(plan["path"].to_pylist(), plan["start"].to_pylist(), strict=True)
        begins = sum(breaks[path][bisect_right(breaks[path], start) - 1] for path, start in starts)
        return (pc.sum(plan["stop"]).as_py() - begins) * self.corpus.row_bytes

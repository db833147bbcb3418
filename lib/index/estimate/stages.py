"""The stages of a build that does not exist yet: from the functions that plan them, and from measured costs.

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
from .stage import StageEstimate

CARD_OBJECTS = 3  # card.json, README.md, curve.svg
READ_COPIES = 3  # of vectors that are read: as stored, as numbers, rotated
LIST_ROW_BYTES = 8 + 4 + 4 + 4  # in memory: a number, a score, a value of the search parameter, a query
MERGE_PASSES = 3  # over a segment's bytes: downloaded, copied list by list, uploaded


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
    def vector(self) -> int:
        """Bytes of a vector in memory."""
        return 4 * self.build.format.dim

    @property
    def trained(self) -> int:
        """Bytes of the empty index."""
        return int(self.costs.codec_bytes + self.costs.lookup.centroid_bytes * self.lists)

    def stages(self) -> tuple[list[StageEstimate], list[float]]:
        """Every stage in order, and the bytes of each segment. Raises InputError for a sample that is too small to train on."""
        merged = self.build.config.merge
        sample, sampled = self.sample()
        training = self.train(sampled)
        encode, rows = self.encode()
        parts = [Part(number, "", 0, 0, "", count, count, 0, 0, 0) for number, count in enumerate(rows.tolist())]
        groups = group_parts(parts, self.build.row_bytes, self.trained, merged or 1)
        segments = [sum(part.rows for part in group) for group in groups]
        after = [self.fill(segments, len(parts)), *([self.merge(segments)] if merged else [])]
        measures = [*self.probe(segments), *self.exact(encode, int(rows.max()))]
        sizes = [count * self.build.row_bytes + self.trained for count in segments]
        return [sample, *training, encode, *after, *measures], sizes

    def sample(self) -> tuple[StageEstimate, np.ndarray]:
        """Also returns the vectors to train on of each part."""
        wanted, held_out = wanted_rows(self.build), self.build.held_out
        plan = sample_plan(self.corpus, wanted + held_out, self.build.format.dim)
        rows, read = rows_of_shards(plan), self._decoded(plan)
        kept, sampled = sample_sizes(rows, -(-wanted // len(rows)), -(-held_out // len(rows)))
        written = float((sampled + kept).sum() * self.vector)
        memory = WORKER_BASE + READ_COPIES * SHARD_BYTES
        seconds = read * self.costs.read + written * self.costs.write
        stage = StageEstimate("sample", len(rows), plan.num_rows, read, written, memory, seconds, self._workers(0))
        return replace(stage, other_objects=1), sampled  # the settings of the build

    def train(self, sampled: np.ndarray) -> list[StageEstimate]:
        """One k-means over the sample; or two levels of k-means, and then the codec alone. sampled: rows of each part."""
        lookup, rows, lists = self.costs.lookup, int(sampled.sum()), self.lists
        if rows < MIN_POINTS * lists:
            raise InputError(
                f"{rows:,} vectors to train on are too few for {lists:,} lists ({MIN_POINTS} a list). Ask for --lists "
                f"{max(1, rows // MIN_POINTS):,} or fewer, or a larger --sample-rows"
            )
        levels = TwoLevels(lists, self.build.format.dim, len(sampled), rows)
        if not has_two_levels(lists):
            seconds = self._kmeans(rows, lists) + self._codec(rows)
            return [self._on_one_node("train", sampled, self.trained, seconds, training_bytes(rows, levels.dim))]
        parts, centroids = sampled[:: levels.codec_stride], lists * self.vector
        taken, links = int(parts.sum()), lists * lookup.link * lookup.growth(lists)
        last = self._on_one_node("train", parts, self.trained, self._codec(taken), training_bytes(taken, levels.dim))
        read, memory = last.read + centroids, last.memory + centroids
        return [*self.two_levels(sampled, levels), replace(last, read=read, memory=memory, serial_seconds=links)]

    def two_levels(self, sampled: np.ndarray, levels: TwoLevels) -> list[StageEstimate]:
        """Cells of a part of the sample, the sample partitioned by cell, and k-means in each cell."""
        costs, cells, workers = self.costs, levels.cells, self._workers(0)
        some = sampled[:: levels.cells_stride]
        seconds, points = self._kmeans(float(some.sum()), cells), float(some.sum() * self.vector)
        first = self._on_one_node("train: cells", some, cells * self.vector, seconds, weight=0)
        first = replace(first, memory=WORKER_BASE + (2 + COPIED) * points)

        size, parts = float(levels.rows * self.vector), -(-levels.parts // levels.parts_a_shard)
        memory = WORKER_BASE + READ_COPIES * float(sampled.max()) * levels.parts_a_shard * self.vector
        comparing = levels.rows * cells * levels.dim * costs.lookup.product
        seconds = size * (costs.read + costs.write) + comparing
        second = StageEstimate("train: partition", parts, levels.parts, size, size, memory, seconds, workers)

        each, written = levels.rows / cells, float(self.lists * self.vector)
        memory = WORKER_BASE + (READ_COPIES + COPIED) * each * self.vector
        seconds = size * costs.read + cells * self._kmeans(each, self.lists / cells)
        slices = cells * parts  # a range of rows in each partitioned part
        third = StageEstimate("train: centroids", cells, slices, size, written, memory, seconds, workers)
        return [first, second, third]

    def encode(self) -> tuple[StageEstimate, np.ndarray]:
        """Also returns the rows of each shard."""
        costs, corpus, format, options = self.costs, self.corpus, self.build.format, self.build.config.vectors
        workers = self._workers(2 * self.trained)
        count = 1 if isinstance(workers, str) else workers.maximum
        plan = cut_shards(corpus, options.shard_rows or encode_shard_rows(corpus, count, format.dim))
        rows, read = rows_of_shards(plan), self._decoded(plan)
        stored = format.dim * pa.type_for_alias(format.type).bit_width / 8
        kept = max(0.0, corpus.row_bytes - stored) if options.keep_columns else 0.0
        written, largest = corpus.rows * (costs.row_bytes + kept), int(rows.max())
        batch = READ_COPIES * min(ROWS_PER_TABLE, largest) * self.vector
        memory = WORKER_BASE + 2 * (self.trained + largest * costs.row_bytes) + batch
        seconds = read * costs.read + corpus.rows * (self._assign() + costs.encode)
        return StageEstimate("encode", len(rows), plan.num_rows, read, written, memory, seconds, workers), rows

    def fill(self, segments: Sequence[int], parts: int) -> StageEstimate:
        """segments: rows of each."""
        rows, count, largest = self.corpus.rows, len(segments), max(segments) * self.build.row_bytes
        codes, repeated = rows * self.build.row_bytes, float(count * self.trained)
        memory = WORKER_BASE + 2 * (self.trained + largest)  # a list of codes doubles as it grows
        seconds = rows * self.costs.fill * self._depth(max(segments)) + repeated * self.costs.repeat
        workers = self._workers(segment_memory(largest, self.trained))
        stage = StageEstimate("segments", count, parts, codes, codes + repeated, memory, seconds, workers)
        return replace(stage, other_objects=count + 1)  # the segments and the manifest

    def merge(self, segments: Sequence[int]) -> StageEstimate:
        groups = balance([{"vectors": rows} for rows in segments], self.build.config.merge or 1)
        codes, count = self.corpus.rows * self.build.row_bytes, len(groups)
        read, written = codes + len(segments) * self.trained, codes + count * self.trained
        weight = merge_memory(self.trained, self.lists, max(map(len, groups)))
        seconds, workers = MERGE_PASSES * read * self.costs.write, self._workers(weight)
        memory, slices = WORKER_BASE + weight, len(segments)
        stage = StageEstimate("merge", count, slices, read, written, memory, seconds, workers)
        return replace(stage, other_objects=2 * count)  # an index and its lists

    def probe(self, segments: Sequence[int]) -> list[StageEstimate]:
        """The search of the segments at every value of the search parameter."""
        costs, kind, rows, count = self.costs, self.build.kind, self.corpus.rows, len(segments)
        queries, values = self.build.config.recall_queries, search_parameter_values(kind, self.lists)
        list_rows = queries * (MAX_CUT + 1) * len(values)
        scanned = count * self._depth(max(segments)) if kind.search_parameter else rows
        if kind.has_lists:
            scanned = sum(values) / self.lists * rows
        looking = count * len(values) * self._assign()
        seconds = queries * (looking + scanned * costs.scan) + count * list_rows * costs.list_row
        read, written = rows * self.build.row_bytes + count * self.trained, count * list_rows * costs.list_bytes
        memory = WORKER_BASE + self.trained + list_rows * LIST_ROW_BYTES
        workers = self._workers(self.trained)
        stage = StageEstimate("measure: probe", count, count, read, written, memory, seconds, workers)
        return self._with_merges(replace(stage, other_objects=CARD_OBJECTS), list_rows)

    def exact(self, encode: StageEstimate, largest: int) -> list[StageEstimate]:
        """Exact search of the queries over all vectors, in the shards of the encoding. largest: rows of a shard."""
        costs, shards, read, queries = self.costs, encode.shards, encode.read, self.build.config.recall_queries
        list_rows = queries * (MAX_CUT + 1)
        written = shards * list_rows * costs.list_bytes
        memory = WORKER_BASE + (READ_COPIES + 1) * largest * self.vector
        searching = self.corpus.rows * queries * costs.exact
        seconds = read * costs.read + searching + shards * list_rows * costs.list_row
        workers = self._workers(0)
        stage = StageEstimate("measure: exact", shards, encode.slices, read, written, memory, seconds, workers)
        # Beside its parts: the queries, and the pairs in the segments' lists.
        return self._with_merges(replace(stage, other_objects=2), list_rows)

    def _with_merges(self, stage: StageEstimate, list_rows: int) -> list[StageEstimate]:
        """A stage whose parts have lists of so many rows, and the stages that merge these until the driver can read them."""
        costs, stages, levels = self.costs, [stage], levels_of_lists(stage.shards)
        memory = WORKER_BASE + READ_COPIES * list_rows * LIST_ROW_BYTES
        for level, (before, after) in enumerate(pairwise(levels)):
            name = f"{stage.name} lists" + (f", {level + 1}" if level else "")
            read, written = before * list_rows * costs.list_bytes, after * list_rows * costs.list_bytes
            seconds = (before + after) * list_rows * costs.list_row
            stages.append(StageEstimate(name, after, before, read, written, memory, seconds, stage.workers))
        stages[-1] = replace(stages[-1], serial_seconds=levels[-1] * list_rows * costs.list_row)
        return stages

    def _on_one_node(
        self, name: str, parts: np.ndarray, written: float, seconds: float, weight: float
    ) -> StageEstimate:
        """A stage of one shard, which reads parts of the sample. parts: rows of each. weight: bytes that it loads."""
        read = float(parts.sum() * self.vector)
        memory, seconds = WORKER_BASE + weight + 2 * self.trained, read * self.costs.read + seconds
        workers = self._workers(weight, whole_node=True)
        stage = StageEstimate(name, 1, len(parts), read, written, memory, seconds, workers)
        return replace(stage, other_objects=1, whole_node=True)  # the cells, or the trained index

    def _workers(self, weight_bytes: float, whole_node: bool = False) -> WorkerPlan | str:
        """The cluster's workers that each load so many bytes; or why there are none."""
        try:
            options = one_worker(self.build) if whole_node else self.build.workers
            return WorkerRequest(options, int(weight_bytes)).resolve()
        except RunError as error:
            return str(error)

    def _assign(self) -> float:
        """Seconds to find the list of a vector; 0 for kinds without lists."""
        return self.costs.lookup.assign(self.lists) if self.build.kind.has_lists else 0.0

    def _kmeans(self, points: float, count: float) -> float:
        """Seconds of k-means, at most: of vectors that differ in all dimensions."""
        compared = ITERATIONS * min(points, MOST_POINTS * count) * count
        return compared * self.build.format.dim * self.costs.lookup.product

    def _codec(self, rows: int) -> float:
        """Seconds to train the codec on so many vectors."""
        rows = min(rows, self.costs.codec_rows)
        return rows / self.costs.codec_rows * self.costs.codec + rows * self._assign()

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

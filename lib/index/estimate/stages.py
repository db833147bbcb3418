"""The stages of a build that does not exist yet: sizes from the functions that plan them, seconds from measured rates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.corpus import Corpus
from ...data.shards import cut_shards
from ...engine.parts import Part
from ...engine.workers import WORKER_BASE, WorkerPlan, WorkerRequest, worker_memory
from ...errors import RunError
from ..build.config import IndexBuild
from ..build.kmeans import ITERATIONS, MOST_POINTS
from ..build.recall import MAX_CUT
from ..build.recall_job import levels_of_lists
from ..build.sample import rows_before, sample_plan, sample_sizes
from ..build.segments import FILL_BYTES, group_parts, merge_memory, segment_memory
from ..build.segments_job import balance, encode_shard_rows
from ..build.stage_parts import rows_of_shards
from ..build.train import CODEC_ROWS, TwoLevels, training_bytes
from ..build.train_job import check_training_rows, has_two_levels, one_worker, wanted_rows
from ..kinds import FLAT_LISTS, search_parameter_values

DRIVER_SECONDS = 0.0015  # a shard: 1.0 and 1.1 ms were measured with 2 and 24 workers
RUN_OBJECTS = 3  # of each stage: its settings, its plan, its manifest
CARD_OBJECTS = 3  # card.json, README.md, curve.svg
COPIES = 3  # in memory, of what a shard reads: as stored, as numbers, rotated
CALL_ROWS = 2  # vectors that are filled into a segment in the time of one more list that some go to

Work = Mapping[str, float]  # amounts by the names of Costs.rates


@dataclass(frozen=True)
class Costs:
    """The measurements of costs.py. codec, centroid: bytes of the empty index, and for each list. row, hit: bytes in Parquet, of an
    encoded row and of a row of a list of hits.

    rates: seconds of a core. copied: a byte that is read or written. compared: a dimension of a centroid with a vector. searched,
    linked: a vector in the graph of centroids, and a centroid of it. trained: the codec. encoded: a vector, without the search for
    its list. filled: a vector of a segment. scanned: a code with a query. scored: a vector with a query, exactly. merged: a hit.
    What goes through a graph counts as often as the logarithm of its size, an estimate.
    """

    rates: Mapping[str, float]
    codec: float
    centroid: float
    row: float
    hit: float

    def seconds(self, work: Work) -> float:
        """Seconds of a core for the work, of the kinds that have a rate."""
        return sum(self.rates.get(name, 0.0) * amount for name, amount in work.items())


@dataclass(frozen=True)
class StageEstimate:
    """slices: rows of the plan. read, written: bytes. work, seconds: of cores, over all shards. weight: bytes that a worker loads.
    other_objects: beside parts and run. serial_seconds: of one core, while the others wait. whole_node: its one worker takes all
    cores of a node. workers: the cluster's, or why there are none.
    """

    name: str
    shards: int
    slices: int
    read: float
    written: float
    work: Work
    weight: float = 0.0
    other_objects: int = 0
    whole_node: bool = False
    serial_seconds: float = 0.0
    seconds: float = 0.0
    workers: WorkerPlan | str = ""

    @property
    def objects(self) -> int:
        return self.shards + RUN_OBJECTS + self.other_objects

    @property
    def memory(self) -> float:
        """Bytes of a worker: an estimate."""
        return worker_memory(int(self.weight)) if self.weight else WORKER_BASE + COPIES * self.read / self.shards

    @property
    def core_seconds(self) -> float:
        return self.seconds + self.serial_seconds

    def clock(self, workers: int, threads: int) -> float:
        """Seconds from the first shard to the last, with so many workers of so many cores."""
        rounds = math.ceil(self.shards / workers)
        return max(rounds * self.seconds / self.shards / threads, DRIVER_SECONDS * self.shards) + self.serial_seconds


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
        return int(self.costs.codec + self.costs.centroid * self.lists)

    @property
    def codes(self) -> float:
        """Bytes of all vectors in segments."""
        return self.corpus.rows * self.build.row_bytes

    @cached_property
    def stages(self) -> list[StageEstimate]:
        """Every stage in order. Raises InputError for a sample that is too small to train on."""
        merges = [self._merge(self.build.config.merge)] if self.build.config.merge else []
        stages = [*self._training(), self._encode(), self._fill(), *merges, *self._probe(), *self._exact()]
        return list(map(self._timed, stages))

    @cached_property
    def segments(self) -> list[int]:
        """The rows of each segment."""
        rows = rows_of_shards(self._encoding).tolist()
        parts = [Part(number, "", 0, 0, "", count, count, 0, 0, 0) for number, count in enumerate(rows)]
        groups = group_parts(parts, self.build.row_bytes, self.trained, self.build.config.merge or 1)
        return [sum(part.rows for part in group) for group in groups]

    @cached_property
    def _encoding(self) -> pa.Table:
        """The plan of the encoding."""
        workers, options = self._workers(2 * self.trained), self.build.config.vectors
        count = 1 if isinstance(workers, str) else workers.maximum
        rows = options.shard_rows or encode_shard_rows(self.corpus, count, self.build.format.dim)
        return cut_shards(self.corpus, rows)

    def _timed(self, stage: StageEstimate) -> StageEstimate:
        """The stage with its workers and seconds. Its work is what it reads and writes, and more."""
        work = {"copied": stage.read + stage.written, **stage.work}
        workers = self._workers(stage.weight, stage.whole_node)
        return replace(stage, work=work, seconds=self.costs.seconds(work), workers=workers)

    def _workers(self, weight: float, whole_node: bool = False) -> WorkerPlan | str:
        """The cluster's workers that each load so many bytes; or why there are none."""
        try:
            options = one_worker(self.build) if whole_node else self.build.workers
            return WorkerRequest(options, int(weight)).resolve()
        except RunError as error:
            return str(error)

    def _training(self) -> list[StageEstimate]:
        """The sample; one k-means over it, or two levels of k-means; and the codec."""
        wanted, held_out, dim = wanted_rows(self.build), self.build.held_out, self.build.format.dim
        plan = sample_plan(self.corpus, wanted + held_out, dim)
        vectors = rows_of_shards(plan)
        kept, parts = sample_sizes(vectors, -(-wanted // len(vectors)), -(-held_out // len(vectors)))
        rows, sampled = int(parts.sum()), int(parts.sum() + kept.sum())
        check_training_rows(self.build, rows, sampled)
        sizes = self._decoded(plan), sampled * self.vector
        sample = StageEstimate("sample", len(vectors), len(plan), *sizes, work={}, other_objects=1)
        if has_two_levels(self.lists):
            return [sample, *self._two_levels(parts, TwoLevels(self.lists, dim, len(parts), rows))]
        return [sample, self._train(parts, {"compared": self._kmeans(rows, self.lists)})]

    def _train(self, parts: np.ndarray, work: Work) -> StageEstimate:
        """The training of the codec, and more work. parts: vectors of each part of the sample."""
        read, weight = float(parts.sum() * self.vector), training_bytes(parts.sum(), self.build.format.dim)
        work = {"trained": 1, **work}
        return StageEstimate("train", 1, len(parts), read, self.trained, work, weight, other_objects=1, whole_node=True)

    def _two_levels(self, parts: np.ndarray, levels: TwoLevels) -> list[StageEstimate]:
        """Cells of a part of the sample, the sample partitioned by cell, k-means in each cell, and the codec."""
        cells, some, shards = levels.cells, parts[:: levels.cells_stride], -(-levels.parts // levels.parts_a_shard)
        size, centroids = levels.rows * self.vector, self.lists * self.vector
        first = {"compared": self._kmeans(some.sum(), cells)}
        second = {"compared": levels.rows * cells * levels.dim}
        third = {"compared": cells * self._kmeans(levels.rows / cells, self.lists / cells)}
        sizes = float(some.sum() * self.vector), cells * self.vector
        last = self._train(parts[:: levels.codec_stride], self.assign(CODEC_ROWS))
        links = self.costs.seconds({"linked": self.lists * math.log(self.lists)})
        return [
            StageEstimate("train: cells", 1, len(some), *sizes, first, other_objects=1, whole_node=True),
            StageEstimate("train: partition", shards, levels.parts, size, size, second),
            StageEstimate("train: centroids", cells, cells * shards, size, centroids, third),
            replace(last, read=last.read + centroids, serial_seconds=links),
        ]

    def _encode(self) -> StageEstimate:
        corpus, format, plan = self.corpus, self.build.format, self._encoding
        stored = format.dim * pa.type_for_alias(format.type).bit_width / 8
        kept = max(0.0, corpus.row_bytes - stored) if self.build.config.vectors.keep_columns else 0.0
        sizes = self._decoded(plan), corpus.rows * (self.costs.row + kept)
        work = {"encoded": corpus.rows, **self.assign(corpus.rows)}
        return StageEstimate("encode", len(rows_of_shards(plan)), len(plan), *sizes, work, weight=2 * self.trained)

    def _fill(self) -> StageEstimate:
        rows, count, parts = self.corpus.rows, len(self.segments), len(rows_of_shards(self._encoding))
        sizes = [each * self.build.row_bytes for each in self.segments]
        calls = min(rows, self.lists * sum(math.ceil(size / FILL_BYTES) for size in sizes))
        work, weight = {"filled": rows * self._depth + CALL_ROWS * calls}, segment_memory(max(sizes), self.trained)
        written, objects = self.codes + count * self.trained, count + 1  # the segments and the manifest
        return StageEstimate("segments", count, parts, self.codes, written, work, weight, objects)

    def _merge(self, merged: int) -> StageEstimate:
        groups, count = balance([{"vectors": rows} for rows in self.segments], merged), len(self.segments)
        sizes = self.codes + count * self.trained, self.codes + len(groups) * self.trained
        weight, objects = merge_memory(self.trained, self.lists, max(map(len, groups))), 2 * len(groups)
        return StageEstimate("merge", len(groups), count, *sizes, work={}, weight=weight, other_objects=objects)

    def _probe(self) -> list[StageEstimate]:
        """The search of the segments at every value of the search parameter."""
        kind, count, queries = self.build.kind, len(self.segments), self.build.config.recall_queries
        values = search_parameter_values(kind, self.lists)
        hits = queries * (MAX_CUT + 1) * len(values)
        codes = sum(values) / self.lists * self.corpus.rows if kind.has_lists else self.corpus.rows
        scanned = queries * (count * self._depth if self._depth > 1 else codes)
        work = {"scanned": scanned, "merged": count * hits, **self.assign(queries * count * len(values))}
        sizes = self.codes + count * self.trained, count * hits * self.costs.hit
        stage = StageEstimate("measure: probe", count, count, *sizes, work, self.trained, CARD_OBJECTS)
        return self._with_merges(stage, hits)

    def _exact(self) -> list[StageEstimate]:
        """Exact search of the queries over all vectors, in the shards of the encoding."""
        queries, plan = self.build.config.recall_queries, self._encoding
        hits, shards = queries * (MAX_CUT + 1), len(rows_of_shards(plan))
        work = {"scored": self.corpus.rows * queries, "merged": shards * hits}
        sizes, objects = (self._decoded(plan), shards * hits * self.costs.hit), 2  # queries; pairs of segments' lists
        stage = StageEstimate("measure: exact", shards, len(plan), *sizes, work, other_objects=objects)
        return self._with_merges(stage, hits)

    def _with_merges(self, stage: StageEstimate, hits: int) -> list[StageEstimate]:
        """A stage with so many hits in each part, and the stages that merge its parts until the driver can read them."""
        stages, levels, size = [stage], levels_of_lists(stage.shards), hits * self.costs.hit
        for level, (before, after) in enumerate(pairwise(levels), 1):
            name = f"{stage.name} lists" + f", {level}" * (level > 1)
            stages.append(StageEstimate(name, after, before, before * size, after * size, {"merged": before * hits}))
        serial = self.costs.seconds({"merged": levels[-1] * hits})
        return [*stages[:-1], replace(stages[-1], serial_seconds=serial)]

    def assign(self, vectors: float) -> Work:
        """The search for the lists of vectors, or of queries."""
        if self.lists > FLAT_LISTS:
            return {"searched": vectors * math.log(self.lists)}
        return {"compared": vectors * self.lists * self.build.format.dim}

    def _kmeans(self, points: float, count: float) -> float:
        """Compared dimensions, at most: of vectors that differ in all of them."""
        return ITERATIONS * min(points, MOST_POINTS * count) * count * self.build.format.dim

    @property
    def _depth(self) -> float:
        """The logarithm of the largest segment, where it is a graph of vectors; 1 for other kinds."""
        is_graph = self.build.kind.search_parameter and not self.build.kind.has_lists
        return math.log(max(*self.segments, 3)) if is_graph else 1.0

    def _decoded(self, plan: pa.Table) -> float:
        """Bytes that a plan's shards read."""
        return (pc.sum(plan["rows"]).as_py() + rows_before(plan, self.corpus).sum()) * self.corpus.row_bytes

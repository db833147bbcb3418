"""A stage of a build that is not there yet, and what it is reckoned of."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ...data.corpus import Corpus
from ...data.formats import Measure
from ...engine.workers import WorkerPlan
from ..build.config import IndexBuild
from ..build.kmeans import ITERATIONS, MOST_POINTS
from ..kinds import ID_BYTES
from .costs import Costs

DRIVER_SECONDS = 0.0015  # a shard (lib/shift.py): 1.0 and 1.1 ms were measured with 2 and 24 workers


@dataclass(frozen=True)
class StageEstimate:
    """read, written: bytes. memory: of a worker, bytes. seconds: of cores, in all shards; alone: of one, while the others wait.

    slices: rows of its plan, which the driver holds. node: whether its one worker takes a whole node. workers: as the cluster
    has them, or why it has none.
    """

    name: str
    shards: int
    read: float
    written: float
    objects: int
    memory: float
    seconds: float
    workers: WorkerPlan | str
    slices: int
    alone: float = 0.0
    node: bool = False

    def clock(self, workers: int, threads: int) -> float:
        """Seconds from its first shard to its last, with so many workers of so many cores."""
        rounds = math.ceil(self.shards / workers)
        return max(rounds * self.seconds / self.shards / threads, DRIVER_SECONDS * self.shards) + self.alone

    @property
    def here(self) -> float | None:
        """The same with the workers there are."""
        if isinstance(self.workers, str):
            return None
        return self.clock(self.workers.maximum, self.workers.threads)


@dataclass(frozen=True)
class EstimateInputs:
    """What the stages are reckoned of. find: workers for bytes that each holds, or for the one that takes a node."""

    build: IndexBuild
    corpus: Corpus
    costs: Costs
    find: Callable[[float, bool], WorkerPlan | str] = field(repr=False)

    @property
    def lists(self) -> int:
        return self.build.choice.lists

    @property
    def vector(self) -> int:
        """Bytes of a vector in memory."""
        return 4 * self.build.format.dim

    @property
    def code(self) -> float:
        """Bytes of a code and its number in a piece."""
        return self.build.kind.bytes(self.build.format.dim) + ID_BYTES

    @property
    def trained(self) -> int:
        """Bytes of the empty index."""
        return int(self.costs.trained + self.costs.centroid * self.lists)

    def kmeans(self, points: float, count: float) -> float:
        """Seconds to make so many centroids of so many vectors, at most: as of vectors that lie apart in all directions."""
        kept = min(points, MOST_POINTS * count)
        return ITERATIONS * kept * count * self.build.format.dim * self.costs.product


def deeper(given: EstimateInputs, rows: int) -> float:
    """How much more a vector costs in a graph of so many than in the one that was measured; 1 where there is no graph."""
    kind = given.build.kind
    if kind.has_lists or not kind.search_parameter:
        return 1.0
    return max(1.0, math.log(max(rows, 2)) / math.log(given.costs.rows))


def shard_rows(plan: pa.Table) -> np.ndarray:
    """Of each shard of a plan, int64."""
    return plan.group_by("shard", use_threads=False).aggregate([("rows", "sum")])["rows_sum"].to_numpy()


def stored(given: EstimateInputs) -> float:
    """Bytes of a vector as it lies in Parquet."""
    return given.build.format.dim * pa.type_for_alias(given.build.format.type).bit_width / 8


def decoded(plan: pa.Table, corpus: Corpus) -> float:
    """Bytes that a plan's shards read: of a row group also what lies before the rows they want."""
    breaks = {f.path: m.breaks for f, m in zip(corpus.files, corpus.measures, strict=True) if isinstance(m, Measure)}
    rows = 0
    for path, start, stop in zip(*(plan[name].to_pylist() for name in ("path", "start", "stop")), strict=True):
        place = bisect_right(breaks[path], start)
        rows += stop - (breaks[path][place - 1] if place else 0)
    return rows * corpus.row_bytes

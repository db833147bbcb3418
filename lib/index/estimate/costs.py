"""The costs of a build's steps on one core of this machine: each stage's own mapper, over one small shard of random vectors.

Seconds are those that a core works (process time): waits for a store are left out. All of it takes a few seconds. Random vectors
have no neighbourhoods: a graph is slower with them.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.shards import FileRange, Shard
from ...data.vectors import as_matrix
from ...engine.mapper import FusedMapper, Result
from ...engine.parts import RUN, Part, parquet_bytes, publish_part
from ...storage.folder import Folder
from ..build.codec import fill, save_index, transforms_of
from ..build.encode import EncodeMapper
from ..build.layout import CODE, NUMBER, TRAINED, VECTOR
from ..build.nearest_centroid import Centroids
from ..build.recall import LISTS, NO_ROW, Pairs
from ..build.recall_mappers import QUERIES, GroundTruthMapper, ProbeSegment
from ..build.segments import FILL_BYTES, BuildSegment
from ..build.stage_parts import binary_column, read_parts
from ..build.threads import compute_with
from ..build.train import CODEC_ROWS, TrainPlan, set_centroids, train_codec
from ..build.vector_source import VectorSource
from ..kinds import FLAT_LISTS, empty_index, lists_of, search_parameter_values

BYTES, MIN_ROWS, MAX_ROWS = 16 << 20, 1024, 16_384  # of the measured vectors, float32
MAX_CENTROIDS = 4096  # that vectors are assigned to
WIDE = 8  # the widest search probes one list in so many, as the last value of the search parameter
QUERY_COUNT, LOOKUPS = 256, 1024  # queries to a segment; vectors assigned to centroids
PAIRS = "pairs.parquet"
BLAS_SETTINGS = "query_bs", "database_bs", "threshold"  # of faiss; exact search changes them for its process


@dataclass(frozen=True)
class Lookup:
    """Seconds to find lists by `centroids` centroids.

    product: a dimension of a centroid, for a vector. nearest: the nearest list of a vector. wide: one list in WIDE, for a query.
    link: a centroid linked into the graph. centroid_bytes: of the empty index, for each centroid.
    """

    centroids: int = 1
    has_graph: bool = False
    product: float = 0.0
    nearest: float = 0.0
    wide: float = 0.0
    link: float = 0.0
    centroid_bytes: float = 0.0

    def growth(self, lists: int) -> float:
        """The cost with so many lists over the measured one. In a graph it grows as the logarithm: an estimate."""
        return max(1.0, math.log(lists) / math.log(self.centroids)) if self.has_graph else lists / self.centroids

    def assign(self, lists: int) -> float:
        """Seconds to find the list of a vector."""
        return self.nearest * self.growth(lists)

    def probe(self, lists: int, nprobe: int) -> float:
        """Seconds to find `nprobe` lists for a query: between the nearest and the widest in proportion."""
        near, far = self.assign(lists), self.wide * lists / self.centroids
        return near + max(0.0, far - near) * WIDE * nprobe / max(lists, 1)


@dataclass(frozen=True)
class Costs:
    """Seconds of a core, and bytes. rows: vectors of the measurement.

    read, write: a byte of vectors in Parquet. encode, write_row, fill: a vector: its code without the search for its list, its row
    in a part, its place in a segment. repeat: a byte of the empty index, which every segment repeats. codec: the training of the
    codec, of the codec_rows that it takes at most. exact: a vector, for a query. scan: a code for a query; of a graph of vectors, a
    query. list_write, list_merge: a row of the lists of hits. row_bytes, list_bytes: of a row in Parquet, encoded or of a list.
    codec_bytes: of the empty index without its centroids.
    """

    rows: int
    lookup: Lookup
    codec: float
    codec_rows: int
    codec_bytes: int
    read: float
    write: float
    encode: float
    write_row: float
    fill: float
    repeat: float
    exact: float
    scan: float
    list_write: float
    list_merge: float
    row_bytes: float
    list_bytes: float

    def lines(self, lists: int, queries: int) -> list[str]:
        """Sentences, in microseconds."""
        micro, lookup = 1e6, self.lookup
        exact = f"exact search of {queries:,} queries {self.exact * queries * micro:,.1f} us a vector"
        sentences = [
            f"encoding {self.encode * micro:,.2f} us a vector, writing its row {self.write_row * micro:,.2f} us, filling it into a "
            f"segment {self.fill * micro:,.2f} us",
            f"reading vectors {1e-6 / self.read:,.0f} MB/s, writing them {1e-6 / self.write:,.0f} MB/s",
            f"{exact}, a code scanned for one query {self.scan * 1e9:,.0f} ns" if lists else exact,
        ]
        if not lists:
            return sentences
        graph = f" by their graph, an estimate: {lookup.nearest * micro:,.1f} us with {lookup.centroids:,}, by the logarithm"
        assigning = (
            f"assigning {lookup.assign(lists) * micro:,.1f} us a vector to {lists:,} lists{graph * lookup.has_graph}"
        )
        return [assigning, f"k-means {2e-9 / lookup.product:,.0f} GFLOP/s", *sentences]


def measure_costs(plan: TrainPlan, number: str, list_share: float) -> Costs:
    """number: type of the vectors' numbers in Parquet. list_share: inverted lists of a segment over its rows.

    Files are written in a temporary folder only.
    """
    rows = min(MAX_ROWS, max(MIN_ROWS, BYTES // (4 * plan.dim)))
    vectors = np.random.default_rng(0).standard_normal((rows + LOOKUPS, plan.dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    few = TrainPlan(plan.kind, plan.dim, max(1, min(plan.lists, QUERY_COUNT, int(rows * list_share))), plan.metric)
    with _one_thread(), TemporaryDirectory(prefix="shoal-dry-run-") as place:
        lookup = _lookup(plan, vectors) if plan.kind.has_lists else Lookup()
        index, codec, codec_rows = _train(few, vectors[:rows])
        trained = save_index(index)
        steps = _Steps(few, Folder(place), vectors[:rows], number, trained)
        costs = (
            steps.input()
            | steps.encode(lookup)
            | steps.fill(plan)
            | steps.exact(vectors[-QUERY_COUNT:])
            | steps.probe()
        )
    codec_bytes = len(trained) - 4 * plan.dim * few.lists * plan.kind.has_lists
    return Costs(rows, lookup, codec, codec_rows, codec_bytes, **costs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """faiss and torch with one thread; their settings come back in the end."""
    import faiss
    import torch

    names = [f"distance_compute_blas_{name}" for name in BLAS_SETTINGS]
    threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    settings = [getattr(faiss.cvar, name) for name in names]
    compute_with(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads[0])
        torch.set_num_threads(threads[1])
        for name, value in zip(names, settings, strict=True):
            setattr(faiss.cvar, name, value)


def _lookup(plan: TrainPlan, vectors: np.ndarray) -> Lookup:
    """The search for lists with the quantizer that so many lists have, some vectors for its centroids."""
    import faiss

    count = min(plan.lists, MAX_CENTROIDS, len(vectors) - LOOKUPS)
    points, has_graph = vectors[-LOOKUPS:], plan.lists > FLAT_LISTS
    centroids = Centroids.for_vectors(vectors[:count], plan.inner_product, points)
    product = _seconds(lambda: centroids.nearest(vectors)) / (len(vectors) * count * plan.dim)
    index = plan.empty()  # owns the quantizer
    quantizer: Any = faiss.downcast_index(lists_of(index).quantizer)
    link = _seconds(lambda: quantizer.add(vectors[:count])) / count
    graph_search = _seconds(lambda: quantizer.search(points, 1)) / LOOKUPS
    return Lookup(
        centroids=count,
        has_graph=has_graph,
        product=product,
        nearest=graph_search if has_graph else product * count * plan.dim,
        wide=_seconds(lambda: quantizer.search(points[:QUERY_COUNT], max(1, count // WIDE))) / QUERY_COUNT,
        link=link,
        centroid_bytes=len(save_index(quantizer)) / count if has_graph else 4.0 * plan.dim,
    )


def _train(plan: TrainPlan, vectors: np.ndarray) -> tuple[Any, float, int]:
    """An index with vectors for centroids; the seconds of a whole training of its codec, and the vectors that it takes.

    Few vectors train it here. Of a learned rotation one iteration is timed.
    """
    import faiss

    index, fit, seconds = plan.empty(), vectors[:MIN_ROWS], 0.0
    for transform in transforms_of(index):
        iterations = 0
        if isinstance(transform, faiss.OPQMatrix):
            codebooks = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
            codebooks.cp.min_points_per_centroid = 1  # no warning of few vectors
            iterations, transform.pq = transform.niter, codebooks
            transform.niter, transform.niter_pq_0 = 1, transform.niter_pq
        seconds += iterations * _seconds(lambda each=transform: each.train(fit)) * CODEC_ROWS / len(fit)
    if not plan.kind.has_lists:
        return index, 0.0, CODEC_ROWS
    set_centroids(index, vectors[: plan.lists])
    inner = lists_of(index)
    if hasattr(inner, "pq"):
        inner.pq.cp.min_points_per_centroid = 1
    rows = min(inner.train_encoder_num_vectors() or CODEC_ROWS, CODEC_ROWS)
    return index, seconds + _seconds(lambda: train_codec(index, fit)) * rows / len(fit), rows


class _Steps:
    """The mappers of a build over one shard of vectors, in order: each reads what the ones before it wrote to the folder."""

    def __init__(self, plan: TrainPlan, folder: Folder, vectors: np.ndarray, number: str, trained: bytes) -> None:
        self.plan, self.folder, self.rows, self.trained = plan, folder, len(vectors), trained
        self.table = _input(vectors, number)
        self.source = VectorSource(VECTOR, "id", (), plan.dim, False, False, self.table.schema, {})
        folder.publish(RUN, b"{}")
        folder.publish(TRAINED, trained)

    def input(self) -> dict[str, float]:
        written, part = self._publish("vectors.parquet", Result(self.table))
        self.shard = self._shard(part.part, part.bytes)
        self.source.read(self.shard)  # the first reading of a process starts threads
        self.read = _seconds(lambda: list(self.source.batches(self.shard)))
        return {"read": self.read / part.bytes, "write": written / part.bytes}

    def encode(self, lookup: Lookup) -> dict[str, float]:
        worked, written, part = self._run(EncodeMapper(self.source, self.plan.kind, self.folder, 1), self.shard)
        assigning = self.plan.lists * self.plan.dim * lookup.product
        self.encoded = self._shard(part.part, part.bytes)
        return {
            "encode": max((worked - self.read) / self.rows - assigning, 1e-9),
            "write_row": written / self.rows,
            "row_bytes": part.bytes / self.rows,
        }

    def fill(self, plan: TrainPlan) -> dict[str, float]:
        """plan: of the build, with all its lists."""
        mapper = BuildSegment(plan.kind, self.folder, self.folder, ("segment.faiss",), (0,), 1, {})
        empty, _, _ = self._run(mapper, Shard(0, ()))
        filled, _, _ = self._run(mapper, self.encoded)
        scattered = self._fill_scattered(plan) if plan.kind.has_lists else 0.0
        return {"fill": (max(filled - empty, 0.0) + scattered) / self.rows, "repeat": empty / len(self.trained)}

    def _fill_scattered(self, plan: TrainPlan) -> float:
        """Seconds to fill codes into as many lists as so large a share of FILL_BYTES goes to: each list costs a call."""
        (table,) = read_parts([self.encoded.ranges[0].path], [CODE], {})
        codes, numbers = as_matrix(table[CODE], np.uint8), np.arange(self.rows)
        count = max(1, min(plan.lists * codes.nbytes // FILL_BYTES, self.rows, FLAT_LISTS))
        index = empty_index(plan.kind, plan.dim, count, plan.metric)
        return _seconds(lambda: fill(plan.kind, index, numbers, numbers % count, codes))

    def exact(self, queries: np.ndarray) -> dict[str, float]:
        columns = {VECTOR: binary_column(queries), NUMBER: np.full(len(queries), NO_ROW)}
        self.folder.publish(QUERIES, parquet_bytes(pa.table(columns)))
        self.folder.publish(PAIRS, parquet_bytes(Pairs.of_lists([]).to_table()))
        mapper = GroundTruthMapper(self.source, self.plan.metric, self.folder, PAIRS, (0,), 1)
        worked, written, part = self._run(mapper, self.shard)
        lists = [self.folder.path(part.part)] * 3
        return {
            "exact": worked / self.rows / len(queries),
            "list_write": written / part.rows,
            "list_merge": _seconds(lambda: LISTS.merge(read_parts(lists, LISTS.columns, {}))) / 3 / part.rows,
            "list_bytes": part.bytes / part.rows,
        }

    def probe(self) -> dict[str, float]:
        kind = self.plan.kind
        values = (self.plan.lists,) if kind.has_lists else search_parameter_values(kind, 0)
        mapper = ProbeSegment(kind, self.plan.metric, values, self.folder, 1, {})
        worked, _, _ = self._run(mapper, self._shard("segment.faiss", 0))
        is_graph = kind.search_parameter and not kind.has_lists
        return {"scan": worked / QUERY_COUNT / (1 if is_graph else self.rows)}

    def _run(self, mapper: FusedMapper, shard: Shard) -> tuple[float, float, Part]:
        """Seconds of the work on a shard, after loading, and of writing its part; and the part."""
        work, results = mapper.load(), []
        worked = _seconds(lambda: results.append(work(shard)))
        return worked, *self._publish(f"{type(mapper).__name__}.parquet", results[0])

    def _publish(self, name: str, result: Result) -> tuple[float, Part]:
        counts = {"rows": result.table.num_rows} | dict(result.counts)
        began = time.process_time()
        part = publish_part(self.folder, name, 0, result.table, counts, result.facts, result.groups)
        return time.process_time() - began, part

    def _shard(self, name: str, size: int) -> Shard:
        return Shard(0, (FileRange(self.folder.path(name), name, 0, self.rows, self.rows, size, "", None),))


def _input(vectors: np.ndarray, number: str) -> pa.Table:
    """Rows as embed_corpus.py writes them, with numbers of that type."""
    numbers = (vectors * 127).astype(np.int8) if number == "int8" else vectors
    values = pa.array(numbers.reshape(-1)).cast(pa.type_for_alias(number))
    ids = [f"document-{row:09d}" for row in range(len(vectors))]
    return pa.table({"id": ids, VECTOR: pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])})


def _seconds(step: Callable[[], object]) -> float:
    """Seconds that a core works on a step."""
    began = time.process_time()
    step()
    return time.process_time() - began

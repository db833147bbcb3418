"""The costs of a build's steps on one core of this machine: each stage's own mapper, over one small shard of random vectors.

Seconds are those that a core works (process time): waits for a store are left out. All of it takes a few seconds. Random vectors
have no neighbourhoods: a graph is slower with them.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
from ..exact.top_k_merge import TopKMerge
from ..kinds import FLAT_LISTS, lists_of, search_parameter_values

BYTES, MIN_ROWS, MAX_ROWS = 16 << 20, 1024, 16_384  # of the measured vectors, float32
MAX_CENTROIDS = 4096  # that vectors are assigned to
REPEATS = 4  # of the vectors, to train a codec
QUERY_COUNT, LOOKUPS = 256, 1024  # queries to a segment; vectors assigned to centroids
PAIRS, SEGMENT = "pairs.parquet", "segment.faiss"
BLAS_SETTINGS = "query_bs", "database_bs", "threshold"  # of faiss; exact search changes them for its process


@dataclass(frozen=True)
class Lookup:
    """Seconds to find lists by `centroids` centroids.

    product: a dimension of a centroid, for a vector. nearest: the nearest list of a vector. link: a centroid linked into the graph.
    centroid_bytes: of the empty index, for each centroid.
    """

    centroids: int = 1
    has_graph: bool = False
    product: float = 0.0
    nearest: float = 0.0
    link: float = 0.0
    centroid_bytes: float = 0.0

    def growth(self, lists: int) -> float:
        """The cost with so many lists over the measured one. In a graph it grows as the logarithm: an estimate."""
        return max(1.0, math.log(lists) / math.log(self.centroids)) if self.has_graph else lists / self.centroids

    def assign(self, lists: int) -> float:
        """Seconds to find the list of a vector, or the lists of a query."""
        return self.nearest * self.growth(lists)


@dataclass(frozen=True)
class Costs:
    """Seconds of a core, and bytes. rows: vectors of the measurement.

    read, write: a byte of vectors in Parquet. encode, fill: a vector: its row in a part, without the search for its list; its place
    in a segment. repeat: a byte of the empty index, which every segment repeats. codec: the training of the codec, of the codec_rows
    that it takes at most. exact: a vector, for a query. scan: a code for a query; of a graph of vectors, a query. list_row: a row of
    the lists of hits, merged or written. row_bytes, list_bytes: of a row in Parquet, encoded or of a list. codec_bytes: of the empty
    index without its centroids.
    """

    rows: int
    lookup: Lookup
    codec: float
    codec_rows: int
    codec_bytes: int
    read: float
    write: float
    encode: float
    fill: float
    repeat: float
    exact: float
    scan: float
    list_row: float
    row_bytes: float
    list_bytes: float

    def lines(self, lists: int, queries: int) -> list[str]:
        """Sentences, in microseconds."""
        micro, lookup = 1e6, self.lookup
        exact = f"exact search of {queries:,} queries {self.exact * queries * micro:,.1f} us a vector"
        sentences = [
            f"encoding {self.encode * micro:,.2f} us a vector, filling it into a segment {self.fill * micro:,.2f} us",
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
    few = replace(plan, lists=max(1, min(plan.lists, QUERY_COUNT, int(rows * list_share))))
    with _one_thread(), TemporaryDirectory(prefix="shoal-dry-run-") as place:
        lookup = _lookup(plan, vectors) if plan.kind.has_lists else Lookup()
        index, codec, codec_rows = _train(few, vectors[:rows])
        trained = save_index(index)
        seconds = _measure_steps(few, plan.lists, Folder(place), vectors, number, trained)
    seconds["encode"] = max(seconds["encode"] - few.lists * plan.dim * lookup.product, 1e-9)
    codec_bytes = len(trained) - 4 * plan.dim * few.lists * plan.kind.has_lists
    return Costs(rows, lookup, codec, codec_rows, codec_bytes, **seconds)


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
        link=link,
        centroid_bytes=len(save_index(quantizer)) / count if has_graph else 4.0 * plan.dim,
    )


def _train(plan: TrainPlan, vectors: np.ndarray) -> tuple[Any, float, int]:
    """An index with vectors for centroids; the seconds of a whole training of its codec, and the vectors that it takes.

    The vectors are repeated, to be about as many as train it. Of a learned rotation one iteration is timed.
    """
    import faiss

    index, fit, seconds = plan.empty(), np.tile(vectors, (REPEATS, 1))[:CODEC_ROWS], 0.0
    for transform in transforms_of(index):
        iterations = 0
        if isinstance(transform, faiss.OPQMatrix):
            codebooks = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
            codebooks.cp.min_points_per_centroid = 1  # no warning of few vectors
            iterations, transform.pq = transform.niter, codebooks
            transform.niter, transform.niter_pq_0 = 1, transform.niter_pq
        seconds += iterations * _seconds(partial(transform.train, fit)) * CODEC_ROWS / len(fit)
    if not plan.kind.has_lists:
        return index, 0.0, CODEC_ROWS
    set_centroids(index, vectors[: plan.lists])
    inner = lists_of(index)
    if hasattr(inner, "pq"):
        inner.pq.cp.min_points_per_centroid = 1
    rows = min(inner.train_encoder_num_vectors() or CODEC_ROWS, CODEC_ROWS)
    fit = fit[:rows]
    return index, seconds + _seconds(lambda: train_codec(index, fit)) * rows / len(fit), rows


def _measure_steps(
    plan: TrainPlan, lists: int, folder: Folder, vectors: np.ndarray, number: str, trained: bytes
) -> dict[str, float]:
    """The mappers of a build over one shard: all but the last LOOKUPS vectors; of these QUERY_COUNT are queries.

    plan: with few lists, as `trained` has. lists: of the build.
    """
    kind, rows, queries = plan.kind, len(vectors) - LOOKUPS, vectors[-QUERY_COUNT:]
    table = _input(vectors[:rows], number)
    source = VectorSource(VECTOR, "id", (), plan.dim, False, False, table.schema, {})
    folder.publish(RUN, b"{}")
    folder.publish(TRAINED, trained)
    own = np.full(QUERY_COUNT, NO_ROW)
    folder.publish(QUERIES, parquet_bytes(pa.table({VECTOR: binary_column(queries), NUMBER: own})))
    folder.publish(PAIRS, parquet_bytes(Pairs.of_lists([]).to_table()))

    wrote, part = _publish(folder, "vectors.parquet", Result(table))
    shard = _shard(folder, part.part, rows, part.bytes)
    source.read(shard)  # the first reading of a process starts threads
    read = _seconds(lambda: list(source.batches(shard)))
    encoded, row_part = _run(EncodeMapper(source, kind, folder, 1), shard, folder)
    filler, row_shard = BuildSegment(kind, folder, folder, (SEGMENT,), (0,), 1, {}), _shard(folder, row_part.part, rows)
    empty, _ = _run(filler, Shard(0, ()), folder)
    filled, _ = _run(filler, row_shard, folder)
    scattered = _fill_scattered(plan, lists, folder.path(row_part.part)) if kind.has_lists else 0.0
    exact, list_part = _run(GroundTruthMapper(source, plan.metric, folder, PAIRS, (0,), 1), shard, folder)
    merged, _ = _run(TopKMerge(LISTS, {}), Shard(0, _shard(folder, list_part.part, list_part.rows).ranges * 3), folder)
    values = (plan.lists,) if kind.has_lists else search_parameter_values(kind, 0)
    prober = ProbeSegment(kind, plan.metric, values, folder, 1, {})
    probed, _ = _run(prober, _shard(folder, SEGMENT, rows), folder)
    list_row, is_graph = merged / 3 / list_part.rows, kind.search_parameter and not kind.has_lists
    return {
        "read": read / part.bytes,
        "write": wrote / part.bytes,
        "encode": (encoded - read) / rows,
        "row_bytes": row_part.bytes / rows,
        "fill": (max(filled - empty, 0.0) + scattered) / rows,
        "repeat": empty / len(trained),
        "exact": max(exact - read - list_row * list_part.rows, 1e-9) / rows / QUERY_COUNT,
        "scan": probed / QUERY_COUNT / (1 if is_graph else rows),
        "list_row": list_row,
        "list_bytes": list_part.bytes / list_part.rows,
    }


def _fill_scattered(plan: TrainPlan, lists: int, path: str) -> float:
    """Seconds to fill codes into as many lists as so large a share of FILL_BYTES goes to: each list costs a call."""
    (table,) = read_parts([path], [CODE], {})
    codes, numbers = as_matrix(table[CODE], np.uint8), np.arange(table.num_rows)
    count = max(1, min(lists * codes.nbytes // FILL_BYTES, table.num_rows, FLAT_LISTS))
    index = replace(plan, lists=count).empty()
    return _seconds(lambda: fill(plan.kind, index, numbers, numbers % count, codes))


def _run(mapper: FusedMapper, shard: Shard, folder: Folder) -> tuple[float, Part]:
    """Seconds of a shard's work, after loading, and of writing its part; and the part."""
    work, results = mapper.load(), []
    worked = _seconds(lambda: results.append(work(shard)))
    wrote, part = _publish(folder, f"{type(mapper).__name__}.parquet", results[0])
    return worked + wrote, part


def _publish(folder: Folder, name: str, result: Result) -> tuple[float, Part]:
    counts, parts = {"rows": result.table.num_rows} | dict(result.counts), []
    publishing = (folder, name, 0, result.table, counts, result.facts, result.groups)
    return _seconds(lambda: parts.append(publish_part(*publishing))), parts[0]


def _shard(folder: Folder, name: str, rows: int, size: int = 0) -> Shard:
    return Shard(0, (FileRange(folder.path(name), name, 0, rows, rows, size, "", None),))


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

"""What the steps of a build cost a core of this machine: the verbs themselves, over a few random vectors of the same dimensions.

Seconds are those that a core works (process time), not the clock's: what else the machine does hardly counts, and neither does
waiting for a store. A few of them altogether. Random vectors have no neighbourhoods: a graph is the slower for it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.shards import FileRange, Shard
from ...data.vectors import as_matrix
from ...engine.mapper import FusedMapper
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
from ..build.vector_source import VectorSource
from ..kinds import FLAT_LISTS, IndexKind, Metric, empty_index, lists_of, search_parameter_values, uses_inner_product

BYTES, LEAST_ROWS, MOST_ROWS = 16 << 20, 1024, 16_384  # of float32 vectors that are encoded, and how many that may be
CENTROIDS = 4096  # that vectors are assigned to, where there are as many lists
WIDE = 8  # the widest probe seeks a list in so many, as the ladder of efforts ends
ASKED, LOOKED_UP = 256, 1024  # queries to an index, and vectors assigned
FOUND = "found.parquet"
MOST_TRAINED = 2**62  # vectors that a codec learns of, where faiss takes all there are
SETTINGS = "query_bs", "database_bs", "threshold"  # of faiss's products, which exact search changes for its process


@dataclass(frozen=True)
class Costs:
    """Seconds of a core, and bytes. rows and centroids: how many it was measured with.

    product: a dimension of a centroid, for a vector held against it. narrow: the nearest list of a vector, wide: one in WIDE of
    them for a query; with add, a centroid linked into the graph, all three by `centroids` lists. read, put: a byte of vectors
    from Parquet and into it. encode: a code without its list; write: its row into a part; fill: a row into a piece; repeat: a
    byte of the empty index, which every piece repeats. codec: its training, a vector of the codec_rows that it takes at most and
    that are assigned first. truth: a vector held against a query. scan: a code held against one, or, of a graph of vectors, a
    query at every effort. told, met: a place of a query's list written, and gone through.

    row, place: bytes in Parquet of an encoded row and of a place of a list. trained: of the empty index beside its centroids;
    centroid: of each, its links included.
    """

    rows: int
    centroids: int
    graph: bool
    product: float
    narrow: float
    wide: float
    add: float
    read: float
    put: float
    encode: float
    write: float
    fill: float
    repeat: float
    codec: float
    codec_rows: int
    truth: float
    scan: float
    told: float
    met: float
    row: float
    place: float
    trained: float
    centroid: float

    def assigned(self, lists: int) -> float:
        """Seconds to find a vector's list. In a graph more lists cost as their logarithm: an estimate."""
        return self.narrow * self._more(lists)

    def linked(self, lists: int) -> float:
        """Seconds to link one of so many centroids."""
        return self.add * self._more(lists)

    def probed(self, lists: int, effort: int) -> float:
        """Seconds to find `effort` lists for a query: between the nearest and the widest in proportion."""
        near, far = self.assigned(lists), self.wide * lists / max(self.centroids, 1)
        return near + max(0.0, far - near) * WIDE * effort / max(lists, 1)

    def _more(self, lists: int) -> float:
        if not self.graph:
            return lists / max(self.centroids, 1)
        return max(1.0, math.log(lists) / math.log(self.centroids))

    def lines(self, lists: int, queries: int) -> list[str]:
        """Sentences, in microseconds."""
        micro = 1e6
        how = f" by their graph, an estimate: {self.narrow * micro:,.1f} us with {self.centroids:,}, by the logarithm"
        truth = f"exact search of {queries:,} queries {self.truth * queries * micro:,.1f} us a vector"
        found = [
            f"encoding {self.encode * micro:,.2f} us a vector, writing its row {self.write * micro:,.2f} us, filling it into a "
            f"piece {self.fill * micro:,.2f} us",
            f"reading vectors {1e-6 / self.read:,.0f} MB/s, writing them {1e-6 / self.put:,.0f} MB/s",
            f"{truth}, a code scanned for one query {self.scan * 1e9:,.0f} ns" if lists else truth,
        ]
        if not lists:
            return found
        assigning = (
            f"assigning {self.assigned(lists) * micro:,.1f} us a vector to {lists:,} lists{how if self.graph else ''}"
        )
        return [assigning, f"k-means {2e-9 / self.product:,.0f} GFLOP/s", *found]


def measure_costs(kind: IndexKind, dim: int, lists: int, metric: Metric, number: str, row_lists: float) -> Costs:
    """number: type of the vectors' numbers in Parquet. row_lists: inverted lists of a piece over its rows.

    Nothing is written but in a temporary folder, which is gone in the end.
    """
    rows = min(MOST_ROWS, max(LEAST_ROWS, BYTES // (4 * dim)))
    vectors = np.random.default_rng(0).standard_normal((rows + LOOKED_UP, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with _one_thread(), TemporaryDirectory(prefix="shoal-dry-run-") as place:
        found = _lookup(kind, dim, lists, metric, vectors, min(max(lists, 1), CENTROIDS, rows))
        few = max(1, min(lists, ASKED, int(rows * row_lists)))
        index, codec, codec_rows = _learned(kind, dim, few, metric, vectors[:rows])
        steps = _steps(kind, index, few, lists, metric, number, vectors, place)
    steps["encode"] = max(steps["encode"] - few * dim * found["product"] * kind.has_lists, 1e-9)
    held = {
        "trained": len(save_index(index)) - 4 * dim * few * kind.has_lists,
        "codec": codec,
        "codec_rows": codec_rows,
    }
    return Costs(**{"rows": rows} | found | steps | held)


@contextmanager
def _one_thread() -> Iterator[None]:
    """faiss and torch with one thread, and these settings as they were before."""
    import faiss
    import torch

    names = [f"distance_compute_blas_{name}" for name in SETTINGS]
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


def _lookup(kind: IndexKind, dim: int, lists: int, metric: Metric, vectors: np.ndarray, count: int) -> dict[str, Any]:
    """What finding the nearest of `count` centroids costs, with the quantizer that so many lists have."""
    import faiss

    graph = lists > FLAT_LISTS
    exact = (faiss.IndexFlatIP if uses_inner_product(kind, metric) else faiss.IndexFlatL2)(dim)
    exact.add(vectors[:count])
    asked = vectors[-LOOKED_UP:]
    centroids = Centroids.for_vectors(vectors[:count], uses_inner_product(kind, metric), asked)
    product = _seconds(lambda: centroids.nearest(vectors)) / (len(vectors) * count * dim)
    quantizer: Any = exact
    add = 0.0
    if graph:
        owner = empty_index(kind, dim, lists, metric)  # whose quantizer goes when it does
        quantizer = faiss.downcast_index(lists_of(owner).quantizer)
        add = _seconds(lambda: quantizer.add(vectors[:count])) / count
    narrow = _seconds(lambda: quantizer.search(asked, 1)) / len(asked) if graph else product * count * dim
    wide = _seconds(lambda: quantizer.search(asked[:ASKED], max(1, count // WIDE))) / ASKED
    found = {"graph": graph, "product": product, "narrow": narrow, "wide": wide, "add": add, "centroids": count}
    return found | {"centroid": len(save_index(quantizer)) / count if graph else 4.0 * dim}


def _learned(kind: IndexKind, dim: int, lists: int, metric: Metric, vectors: np.ndarray) -> tuple[Any, float, int]:
    """An index with vectors for centroids, its codec hardly trained; seconds a vector of a whole training, and how many it takes.

    A product quantizer's training is timed on one of its groups: the others take as long. A learned rotation is replaced by a
    random one, which turns vectors as quickly, and its learning reckoned from the rounds of quantizers that it trains.
    """
    import faiss

    index = empty_index(kind, dim, lists, metric)
    if not kind.has_lists:
        return index, 0.0, 0
    inner = lists_of(index)
    points, rounds = vectors[:lists], 0
    for turn in transforms_of(index):
        if isinstance(turn, faiss.OPQMatrix):
            rounds += turn.niter * turn.niter_pq + turn.niter_pq_0
            random = faiss.RandomRotationMatrix(dim, dim)
            random.init(0)
            faiss.copy_array_to_vector(faiss.vector_to_array(random.A), turn.A)
            turn.is_trained = True
        else:
            turn.train(points)
        points = turn.apply(points)
    faiss.downcast_index(inner.quantizer).add(np.ascontiguousarray(points))
    rows, seconds = inner.train_encoder_num_vectors() or MOST_TRAINED, 0.0
    if hasattr(inner, "pq"):
        groups = np.random.default_rng(1).standard_normal((rows, inner.pq.dsub), dtype=np.float32)
        means = faiss.Kmeans(inner.pq.dsub, inner.pq.ksub, niter=2, min_points_per_centroid=1)
        once = _seconds(lambda: means.train(groups)) / 2 / rows
        seconds = once * inner.pq.M * (inner.pq.cp.niter + rounds)
        inner.pq.cp.niter, inner.pq.cp.min_points_per_centroid = 1, 1
    index.train(vectors[:LEAST_ROWS])
    return index, seconds, rows if inner.by_residual else 0


def _steps(
    kind: IndexKind, index: Any, few: int, lists: int, metric: Metric, number: str, vectors: np.ndarray, place: str
) -> dict[str, float]:
    """The verbs over all but the last LOOKED_UP vectors, of which ASKED are queries. index: trained, of `few` lists."""
    rows, dim = len(vectors) - LOOKED_UP, vectors.shape[1]
    folder, table = Folder(place), _input(vectors[:rows], number)
    folder.publish(RUN, b"{}")
    folder.publish(TRAINED, save_index(index))
    folder.publish(
        QUERIES, parquet_bytes(pa.table({VECTOR: binary_column(vectors[-ASKED:]), NUMBER: np.full(ASKED, NO_ROW)}))
    )
    folder.publish(FOUND, parquet_bytes(Pairs.of_lists([]).to_table()))
    began = time.process_time()
    part = publish_part(folder, "vectors.parquet", 0, table, {"rows": rows})
    put, size = time.process_time() - began, part.bytes
    source = VectorSource(VECTOR, "id", (), dim, False, False, table.schema, {})
    shard = _shard(folder, part.part, rows, size)

    source.read(shard)  # what the first reading of a process takes, no other does
    read = _seconds(lambda: list(source.batches(shard)))
    (encoded, written), part = _taken(EncodeMapper(source, kind, folder, 1), shard, folder, "rows.parquet")
    pieces = BuildSegment(kind, folder, folder, ("piece.faiss",), (0,), 1, {})
    (empty, _), _ = _taken(pieces, Shard(0, ()), folder, "told.parquet")
    (filled, _), _ = _taken(pieces, _shard(folder, part.part, rows, part.bytes), folder, "told.parquet")
    scattered = _scattered(kind, dim, lists, metric, folder.path(part.part)) if kind.has_lists else 0.0
    (exact, listed), best = _taken(
        GroundTruthMapper(source, metric, folder, FOUND, (0,), 1), shard, folder, "truth.parquet"
    )
    again = [folder.path(best.part)] * 3
    met = _seconds(lambda: LISTS.merge(read_parts(again, LISTS.columns, {}))) / 3
    ladder = (few,) if kind.has_lists else search_parameter_values(kind, 0)
    piece = _shard(folder, "piece.faiss", rows, 0)
    (probed, _), _ = _taken(ProbeSegment(kind, metric, ladder, folder, 1, {}), piece, folder, "probe.parquet")
    scanned = ASKED * (1 if kind.search_parameter and not kind.has_lists else rows)
    return {
        "read": read / size,
        "put": put / size,
        "encode": max(encoded - read, 1e-9) / rows,
        "write": written / rows,
        "fill": (max(filled - empty, 0.0) + scattered) / rows,
        "repeat": empty / len(save_index(index)),
        "truth": exact / rows / ASKED,
        "scan": probed / scanned,
        "told": listed / best.rows,
        "met": met / best.rows,
        "row": part.bytes / rows,
        "place": best.bytes / best.rows,
    }


def _scattered(kind: IndexKind, dim: int, lists: int, metric: Metric, path: str) -> float:
    """Seconds to fill the codes of a part into as many lists as its share of FILL_BYTES meets: each costs a call."""
    (table,) = read_parts([path], [CODE], {})
    codes = as_matrix(table[CODE], np.uint8)
    count = max(1, min(lists * codes.nbytes // FILL_BYTES, len(codes), FLAT_LISTS))
    numbers, index = np.arange(len(codes)), empty_index(kind, dim, count, metric)
    return _seconds(lambda: fill(kind, index, numbers, numbers % count, codes))


def _input(vectors: np.ndarray, number: str) -> pa.Table:
    """Rows as embed_corpus.py leaves them, with numbers of that type."""
    numbers = (vectors * 127).astype(np.int8) if number == "int8" else vectors
    ids = [f"document-{row:09d}" for row in range(len(vectors))]
    return pa.table({"id": ids, VECTOR: _column(numbers, number)})


def _column(vectors: np.ndarray, number: str = "float") -> pa.Array:
    numbers = pa.array(vectors.reshape(-1)).cast(pa.type_for_alias(number))
    return pa.FixedSizeListArray.from_arrays(numbers, vectors.shape[1])


def _shard(folder: Folder, name: str, rows: int, size: int) -> Shard:
    return Shard(0, (FileRange(folder.path(name), name, 0, rows, rows, size, "", None),))


def _taken(mapper: FusedMapper, shard: Shard, folder: Folder, name: str) -> tuple[Sequence[float], Part]:
    """Seconds of a shard's work and of writing its part, after its worker has started; and the part."""
    work, clock = mapper.load(), time.process_time
    began = clock()
    result = work(shard)
    worked = clock()
    counts = {"rows": len(result.table)} | dict(result.counts)
    part = publish_part(folder, name, 0, result.table, counts, result.facts, result.groups)
    return (worked - began, clock() - worked), part


def _seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began

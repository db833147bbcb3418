"""The two searches that recall compares, on a shard: exact search of vectors, and the search of a segment."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...data.shards import Shard
from ...data.vectors import as_matrix
from ...engine.mapper import FusedMapper, Result
from ...storage.filesystem import download
from ...storage.folder import Folder
from ...storage.scratch import Scratch
from ..exact.topk import exact_top_k
from ..kinds import IndexKind, Metric, scores_of, set_search_parameter
from .codec import open_segment
from .layout import NUMBER, VECTOR
from .recall import EXACT, MAX_CUT, list_table
from .vector_source import VectorSource

QUERIES = "queries.parquet"  # columns VECTOR and NUMBER, which is NO_ROW for a query that is no row of the index
ROUNDING = 1e-6  # relative to the sum of absolute summands: two sums of one product in float32 may differ by as much
PAIRS_AT_ONCE = 4096  # vectors of pairs gathered at a time


@dataclass(frozen=True)
class GroundTruthMapper(FusedMapper):
    """A shard of vectors -> the nearest of them to each query, a list; and the exact scores of `pairs` in it.

    firsts: the number of each shard's first row. pairs: a file in `folder`, from `pairs_of`. `exact_score` has a margin added
    for rounding.
    """

    source: VectorSource
    metric: Metric
    folder: Folder  # of QUERIES
    pairs: str
    firsts: tuple[int, ...]
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        search = exact_top_k("cpu", self.threads)
        vectors, own = read_queries(self.folder)
        center = vectors.mean(axis=0)
        queries = as_products(vectors, center, self.metric, queries=True)
        pairs = _read_table(self.folder, self.pairs)
        pair_numbers, pair_queries = pairs[NUMBER].to_numpy(), pairs["query"].to_numpy()

        def search_shard(shard: Shard) -> Result:
            began = time.perf_counter()
            rows = self.source.read(shard)
            read = time.perf_counter() - began
            places, first = np.flatnonzero(rows.valid), self.firsts[shard.number]
            vectors = as_products(rows.vectors[places], center, self.metric, queries=False)
            scores, nearest_places = search(queries, vectors, np.arange(len(vectors)), MAX_CUT + 1)
            lists = list_table(scores, (first + places)[nearest_places], own, EXACT)
            here = slice(*np.searchsorted(pair_numbers, [first, first + len(rows.valid)]))
            query, number = pair_queries[here], pair_numbers[here]
            exact = _upper_scores(queries, query, vectors, np.searchsorted(places, number - first))
            data = {"value": np.full(len(exact), EXACT, np.int32), "query": query.astype(np.int32)}
            scored = pa.table(data | {NUMBER: number, "exact_score": exact})
            table = pa.concat_tables([lists, scored], promote_options="default")
            return Result(table, groups=[len(lists), len(scored)], seconds={"read": read})

        return search_shard


def _upper_scores(queries: np.ndarray, query: np.ndarray, vectors: np.ndarray, places: np.ndarray) -> np.ndarray:
    """float32 [n]: the products of queries[query[i]] and vectors[places[i]], as large as another order of summing may make them."""
    scores = [np.empty(0, np.float32)]
    for start in range(0, len(places), PAIRS_AT_ONCE):
        here = slice(start, start + PAIRS_AT_ONCE)
        summands = queries[query[here]] * vectors[places[here]]
        scores.append(summands.sum(axis=1) + np.float32(ROUNDING) * np.abs(summands).sum(axis=1))
    return np.concatenate(scores)


@dataclass(frozen=True)
class ProbeSegment(FusedMapper):
    """A segment -> the list that it returns for each query at each value of the search parameter.

    Facts: `seconds` of a core that the search took, by value.
    """

    kind: IndexKind
    metric: Metric
    values: tuple[int, ...]
    folder: Folder  # of QUERIES
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        faiss.omp_set_num_threads(self.threads)
        queries, own = read_queries(self.folder)

        def probe(shard: Shard) -> Result:
            (segment,) = shard.ranges
            tables, seconds = [], {}
            with Scratch("probe") as scratch:
                index = open_segment(download(segment.path, f"{scratch}/segment", self.folder.options))
                for value in self.values:
                    set_search_parameter(self.kind, index, value)
                    began = time.perf_counter()
                    scores, numbers = index.search(queries, MAX_CUT + 1)
                    seconds[str(value)] = (time.perf_counter() - began) * self.threads
                    tables.append(list_table(scores_of(self.kind, self.metric, scores), numbers, own, value))
            return Result(pa.concat_tables(tables), facts={"seconds": seconds})

        return probe


def _read_table(folder: Folder, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(folder.read(name)))


def read_queries(folder: Folder) -> tuple[np.ndarray, np.ndarray]:
    """The queries, float32 [n, dim], and the row that each one is, int64 [n], or NO_ROW."""
    table = _read_table(folder, QUERIES)
    return as_matrix(table[VECTOR], np.float32), table[NUMBER].to_numpy()


def as_products(vectors: np.ndarray, center: np.ndarray, metric: Metric, queries: bool) -> np.ndarray:
    """Vectors whose inner products rank as the metric does.

    For l2 a dimension is added, so that the product is q x - |x|^2 / 2. Vectors are taken relative to the queries' center ([dim]):
    far from it float32 would round the differences away.
    """
    if metric != "l2":
        return vectors
    vectors = vectors - center
    last = np.ones(len(vectors)) if queries else -np.sum(vectors.astype(np.float64) ** 2, axis=1) / 2
    return np.concatenate([vectors, last[:, None].astype(np.float32)], axis=1)

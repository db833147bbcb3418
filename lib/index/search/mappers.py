"""The search job on one shard: a block of queries in one segment; and its hits, the passages of each query, best first."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.ranking import best_of_repeats, rank_ids, top_k
from ...data.shards import Shard, of_source
from ...engine.mapper import FusedMapper, Result
from ...storage.folder import Folder
from ..build.vector_source import VectorRows, VectorSource
from ..exact.mappers import PASSAGE_ID, QUERY_ID, SCORE
from ..kinds import IndexKind, Metric, scores_of
from .segment_reader import Segment, SegmentReader

QUERIES, SEGMENTS = "queries", "segments"  # sources of a shard's ranges
# Hits that a worker has in memory at once: 0.2 kB each while it searches, 0.4 while it merges.
HITS_AT_ONCE = 2 << 20
ERROR = "error"  # why a query has no hit
HITS_SCHEMA = pa.schema(
    [(QUERY_ID, pa.large_string()), (PASSAGE_ID, pa.large_string()), (SCORE, pa.float32()), (ERROR, pa.string())]
)
Hits = tuple[np.ndarray, pa.Array, np.ndarray]  # numbers of queries, int64 [n]; passages' ids; scores, float32 [n]
NO_HITS: Hits = (np.empty(0, np.int64), pa.array([], pa.large_string()), np.empty(0, np.float32))
NO_PASSAGE = "nothing was found: no passage in the lists that were probed, or none that is allowed"


@dataclass(frozen=True)
class SearchSegment(FusedMapper):
    """A block of queries and a segment -> the k best passages of each query; a row with the reason for a query without any.

    value: of the kind's search parameter. ranges: by a segment's name, the number of its first row and its rows. rows: folder of the
    encoded rows. output: folder with the file `allowed`, the ids that a search may return; None for all.
    """

    queries: VectorSource
    kind: IndexKind
    metric: Metric
    value: int
    k: int
    ranges: Mapping[str, tuple[int, int]]
    rows: Folder
    output: Folder
    allowed: str | None
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        faiss.omp_set_num_threads(self.threads)
        allowed = None
        if self.allowed is not None:
            allowed = pq.read_table(pa.BufferReader(self.output.read(self.allowed)))["id"].combine_chunks()
        reader = SegmentReader(self.ranges, self.rows, allowed)

        def work(shard: Shard) -> Result:
            began = time.perf_counter()
            queries = self.queries.read(of_source(shard, QUERIES))
            seconds = {"read": time.perf_counter() - began}
            (file,) = of_source(shard, SEGMENTS).ranges
            table = self._table(reader.open(file.path), queries)
            return Result(table, {"errors": len(table) - table[ERROR].null_count}, seconds=seconds)

        return work

    def _table(self, segment: Segment, queries: VectorRows) -> pa.Table:
        """Hits; then a row for each query without a passage; then a row for each query without a vector."""
        valid = pa.array(queries.valid)
        names = queries.table["id"].combine_chunks()
        with_vector, without = names.filter(valid), pc.invert(valid)
        hits = self._search(segment, np.ascontiguousarray(queries.valid_vectors))
        missed = np.setdiff1d(np.arange(len(with_vector)), hits[0])
        reasons = pa.array([NO_PASSAGE] * len(missed), pa.string())
        return pa.concat_tables(
            [
                hits_table(with_vector, *hits),
                empty_table(with_vector.take(pa.array(missed)), reasons),
                empty_table(names.filter(without), queries.reasons.filter(without)),
            ]
        )

    def _search(self, segment: Segment, vectors: np.ndarray) -> Hits:
        """Search for k rows a query. Where passages are several rows each, search again for more rows, only for the queries that lack
        passages, until each has k of them or all that the segment has."""
        hits, lacking, rows = [NO_HITS], np.arange(len(vectors)), self.k
        while len(lacking):
            block, again = max(1, HITS_AT_ONCE // rows), []
            for places in (lacking[start : start + block] for start in range(0, len(lacking), block)):
                queries, ids, scores = self._nearest_rows(segment, vectors[places], rows)
                short = lacks_passages(queries, ids, len(places), rows, self.k) & (rows < segment.index.ntotal)
                enough = ~short[queries]
                best = best_hits(queries[enough], ids.filter(pa.array(enough)), scores[enough], self.k)
                hits.append((places[best[0]], *best[1:]))
                again.append(places[short])
            lacking, rows = np.concatenate(again), min(4 * rows, segment.index.ntotal)
        return concat_hits(hits)

    def _nearest_rows(self, segment: Segment, vectors: np.ndarray, count: int) -> Hits:
        """The nearest rows of the segment, chunks of one passage each by itself."""
        chosen: dict[str, Any] = {} if segment.selector is None else {"sel": segment.selector}
        if self.kind.search_parameter:
            chosen[self.kind.search_parameter] = self.value
        scores, numbers = segment.index.search(vectors, count, params=self.kind.parameters(**chosen))
        exists = numbers.reshape(-1) >= 0  # faiss pads with -1
        ids = segment.ids.take(pa.array(numbers.reshape(-1)[exists] - segment.first))
        queries = np.repeat(np.arange(len(vectors)), count)[exists]
        return queries, ids, scores_of(self.kind, self.metric, scores).reshape(-1)[exists]


def best_hits(queries: np.ndarray, ids: pa.Array, scores: np.ndarray, k: int) -> Hits:
    """The k best passages of each query, the queries in order. A repeated passage counts once, with its best score."""
    ranks, names = rank_ids(ids)
    queries, scores, ranks = top_k(*best_of_repeats(queries, scores, ranks), k)
    return queries, names.take(pa.array(ranks)), scores


def lacks_passages(queries: np.ndarray, ids: pa.Array, count: int, rows: int, k: int) -> np.ndarray:
    """bool [count]: queries with fewer than k different passages among the `rows` rows that were searched for, all of which were
    returned. More rows may hold more passages."""
    numbers = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    width = int(numbers.max(initial=0)) + 1
    different = np.bincount(np.unique(queries * width + numbers) // width, minlength=count)
    return (different < k) & (np.bincount(queries, minlength=count) >= rows)


def concat_hits(parts: Sequence[Hits]) -> Hits:
    """Hits of different queries, in the order of the queries."""
    queries, scores = (np.concatenate([part[place] for part in parts]) for place in (0, 2))
    order = np.argsort(queries, kind="stable")
    return queries[order], pa.concat_arrays([ids for _, ids, _ in parts]).take(pa.array(order)), scores[order]


def hits_table(names: pa.Array, queries: np.ndarray, ids: pa.Array, scores: np.ndarray) -> pa.Table:
    """Hits as they are published. names: the queries' ids, by number."""
    columns = {QUERY_ID: names.take(pa.array(queries)), PASSAGE_ID: ids, SCORE: scores}
    return pa.table(columns | {ERROR: pa.nulls(len(queries), pa.string())}).cast(HITS_SCHEMA)


def empty_table(names: pa.Array, reasons: pa.Array) -> pa.Table:
    """A row for each query without a hit, with the reason."""
    nulls = {PASSAGE_ID: pa.nulls(len(names), pa.large_string()), SCORE: pa.nulls(len(names), pa.float32())}
    return pa.table({QUERY_ID: names} | nulls | {ERROR: reasons}).cast(HITS_SCHEMA)

"""Hits of a search: the passages of each query, best first. A passage that the index has as several chunks counts once."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ...data.ranking import best_of_repeats, rank_ids, top_k
from ..exact.mappers import PASSAGE_ID, QUERY_ID, SCORE

# Hits that a worker has in memory at once: 0.2 kB each while it searches, 0.4 while it merges.
HITS_AT_ONCE = 2 << 20
ERROR = "error"  # why a query has no hit
HITS_SCHEMA = pa.schema(
    [(QUERY_ID, pa.large_string()), (PASSAGE_ID, pa.large_string()), (SCORE, pa.float32()), (ERROR, pa.string())]
)
Hits = tuple[np.ndarray, pa.Array, np.ndarray]  # numbers of queries, int64 [n]; passages' ids; scores, float32 [n]
NO_HITS: Hits = (np.empty(0, np.int64), pa.array([], pa.large_string()), np.empty(0, np.float32))


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

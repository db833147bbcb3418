"""What a search of an index finds, as lists: each query's passages, best first, a passage that is there as chunks once."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ...data.ranking import best_of_repeats, rank_ids, top_k
from ..exact.mappers import PASSAGE_ID, QUERY_ID, SCORE

# Passages of all lists that a worker has at once: 0.2 kB each while it finds, 0.4 while it merges.
PASSAGES_AT_ONCE = 2 << 20
FOUND_SCHEMA = pa.schema(
    [(QUERY_ID, pa.large_string()), (PASSAGE_ID, pa.large_string()), (SCORE, pa.float32()), ("error", pa.string())]
)
Lists = tuple[
    np.ndarray, pa.Array, np.ndarray
]  # the number of each row's query, int64 [n]; passage; score, float32 [n]
NO_LISTS: Lists = (np.empty(0, np.int64), pa.array([], pa.large_string()), np.empty(0, np.float32))


def ranked(rows: np.ndarray, ids: pa.Array, scores: np.ndarray, most: int) -> Lists:
    """Each query's `most` best passages, the queries in order. One that is there as several chunks counts once, by its best."""
    ranks, names = rank_ids(ids)
    rows, scores, ranks = top_k(*best_of_repeats(rows, scores, ranks), most)
    return rows, names.take(pa.array(ranks)), scores


def falling_short(rows: np.ndarray, ids: pa.Array, queries: int, asked: int, most: int) -> np.ndarray:
    """bool [queries]: which have fewer than `most` different ids among as many rows as were `asked` for; there may be more."""
    numbers = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    width = int(numbers.max(initial=0)) + 1
    different = np.bincount(np.unique(rows * width + numbers) // width, minlength=queries)
    return (different < most) & (np.bincount(rows, minlength=queries) >= asked)


def side_by_side(lists: Sequence[Lists]) -> Lists:
    """Lists of different queries in the order of those."""
    rows, scores = (np.concatenate([each[place] for each in lists]) for place in (0, 2))
    order = np.argsort(rows, kind="stable")
    return rows[order], pa.concat_arrays([ids for _, ids, _ in lists]).take(pa.array(order)), scores[order]


def table_of(queries: pa.Array, rows: np.ndarray, ids: pa.Array, scores: np.ndarray) -> pa.Table:
    """Lists as they are published. queries: the ids, by number."""
    data = {QUERY_ID: queries.take(pa.array(rows)), PASSAGE_ID: ids, SCORE: scores}
    return pa.table(data | {"error": pa.nulls(len(rows), pa.string())}).cast(FOUND_SCHEMA)


def without(ids: pa.ChunkedArray, reasons: pa.ChunkedArray) -> pa.Table:
    """A row for each query that has no passage, with the reason."""
    nothing = {PASSAGE_ID: pa.nulls(len(ids), pa.large_string()), SCORE: pa.nulls(len(ids), pa.float32())}
    return pa.table({QUERY_ID: ids} | nothing | {"error": reasons}).cast(FOUND_SCHEMA)

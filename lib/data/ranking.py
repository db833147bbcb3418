"""The order of a ranking: score descending in float32, ties by id descending, as in trec_eval. numpy and pyarrow only.

Scores and ids become one 64-bit key a row, so that no two passages of a query are equal and any sort gives the same order.

    queries   int [n]       number of each row's query, from 0
    scores    float32 [n]
    ranks     int [n]       place of each row's id among all ids: rank_ids
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError

PADDING = np.iinfo(np.int64).min  # below the key of every row

Ranking = tuple[np.ndarray, np.ndarray, np.ndarray]  # queries, scores, ranks


def rank_ids(ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """The place of each id, int64 [n], among the different ids in byte order; and those, sorted."""
    unique = ids.dictionary_encode()
    order = pc.sort_indices(unique.dictionary).to_numpy()
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places[unique.indices.to_numpy()], unique.dictionary.take(pa.array(order))


def keys(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """int64, shaped as `scores` (cast to float32): the greater the better. ranks: under 2**31.

    Raises InputError for a score that is not a number.
    """
    single = np.asarray(scores, np.float32) + np.float32(0)  # -0.0 is 0.0
    if np.isnan(single).any():
        raise InputError(
            "a score is not a number (NaN), so it has no rank. Mend the vectors or the model that made them"
        )
    bits = single.view(np.int32)
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    return (ordered << 32) | ranks


def split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (float32) and ranks (int64) of keys."""
    ordered = (keys >> 32).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered)
    return bits.view(np.float32), keys & 0xFFFFFFFF


def top_k(queries: np.ndarray, scores: np.ndarray, ranks: np.ndarray, k: int) -> Ranking:
    """The k best rows of each query, best first, in the order of the queries; rows come in any order.

    A query and an id come together once: see `best_of_repeats`. Memory: queries times rows of the longest list, 8 bytes each.
    """
    order = np.argsort(queries, kind="stable")
    queries = queries[order]
    counts = np.bincount(queries)
    table = np.full((len(counts), counts.max(initial=0)), PADDING)  # a query a row, as wide as the longest list
    table[queries, places_in_query(queries)] = keys(scores[order], ranks[order])
    if k < table.shape[1]:
        table = np.partition(table, table.shape[1] - k, axis=1)[:, -k:]
    table = np.sort(table, axis=1)[:, ::-1]
    filled = table != PADDING
    return np.nonzero(filled)[0], *split(table[filled])


def best_of_repeats(queries: np.ndarray, scores: np.ndarray, ranks: np.ndarray) -> Ranking:
    """One row for each query and id, that with the greatest score, as of a passage that is in the lists as several chunks."""
    pairs = np.sort(queries.astype(np.int64) * (int(ranks.max(initial=0)) + 1) + ranks)
    if not (pairs[1:] == pairs[:-1]).any():  # a sort of integers takes a tenth of the time of the one below
        return queries, scores, ranks
    order = np.lexsort((keys(scores, ranks), ranks, queries))
    queries, scores, ranks = queries[order], scores[order], ranks[order]
    last = np.ones(len(order), bool)  # of the rows of its query and id
    last[:-1] = (np.diff(queries) != 0) | (np.diff(ranks) != 0)
    return queries[last], scores[last], ranks[last]


def places_in_query(queries: np.ndarray) -> np.ndarray:
    """int64 [n]: the place of each row among those of its query, from 0. The rows of a query lie together."""
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    return np.arange(len(queries)) - np.repeat(starts, np.diff(np.append(starts, len(queries))))

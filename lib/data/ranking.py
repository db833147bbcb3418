"""The order of a ranking: score descending in float32, ties by id descending, as trec_eval does it. numpy and pyarrow only.

Scores and ids become one 64-bit key a row, so that no two passages of a query are equal and any sort gives the same order.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError

NOTHING = np.iinfo(np.int64).min  # below the key of every row


def rank_ids(ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Of each id its place, int64 [n], among the different ids in byte order, and those, sorted."""
    unique = ids.dictionary_encode()
    order = pc.sort_indices(unique.dictionary).to_numpy()
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places[unique.indices.to_numpy()], unique.dictionary.take(pa.array(order))


def keys(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """int64, shaped as `scores` (cast to float32): the greater the better. ranks: of the ids, under 2**31.

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


def split(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (float32) and ranks (int64) of keys."""
    ordered = (found >> 32).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered)
    return bits.view(np.float32), found & 0xFFFFFFFF


def best(
    queries: np.ndarray, scores: np.ndarray, ranks: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of each query's `most` best, best first, in the order of the queries: (queries, scores, ranks).

    queries: int [n], the number of each row's query, from 0. A passage comes once a query.
    """
    order = np.argsort(queries, kind="stable")
    queries = queries[order]
    counts = np.bincount(queries)
    places = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), counts.max(initial=0)), NOTHING)  # a query a row, as wide as the longest list
    table[queries, places] = keys(scores[order], ranks[order])
    if 0 < most < table.shape[1]:
        table = np.partition(table, table.shape[1] - most, axis=1)[:, -most:]
    table = np.sort(table, axis=1)[:, ::-1]
    there = table != NOTHING
    return np.nonzero(there)[0], *split(table[there])

"""Recall of an index: the lists that the segments return for some queries, compared with those of exact search.

Both come from maps over shards. Exact search also scores the pairs of query and vector that the segments returned: of equal vectors
any is right, whichever its number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from ...data.bootstrap import bootstrap_interval
from ...data.ranking import places_in_query
from ..exact.top_k_merge import RankedLists
from .layout import NUMBER

CUTS = 1, 10, 100
MAX_CUT = max(CUTS)
NO_ROW = -1  # NUMBER of a query that is no row of the index; else this row is left out of the query's list
PADDING = -1  # faiss's number where a list is shorter
EXACT = 0  # in place of a value of the search parameter: a list of exact search
TOLERANCE = 0.005  # of the highest recall: a higher cost for less gain is not advised
LISTS = RankedLists(query=("value", "query"), item=NUMBER, k=MAX_CUT)  # value: of the search parameter
PAIR_COLUMNS = ("query", NUMBER, "exact_score")  # in the last row group of a part of exact search

Lists = tuple[np.ndarray, np.ndarray]  # scores, float32, and numbers, int64: [queries, MAX_CUT], PADDING at the end


def pairs_of(lists: Iterable[np.ndarray]) -> pa.Table:
    """Pairs of a vector's NUMBER and a `query`, each once, in order. lists: of numbers, int64 [queries, n] with PADDING."""
    pairs = [np.empty((0, 2), np.int64)]
    for numbers in lists:
        query, rank = np.nonzero(numbers != PADDING)
        pairs.append(np.stack([numbers[query, rank], query], axis=1))
    unique = np.unique(np.concatenate(pairs), axis=0)
    return pa.table({NUMBER: unique[:, 0], "query": unique[:, 1]})


def _keys(number: np.ndarray, query: np.ndarray, queries: int) -> np.ndarray:
    """A number of each pair, int64 [n], in the order of pairs. queries: their count."""
    return number * queries + query


def list_table(scores: np.ndarray, numbers: np.ndarray, own: np.ndarray, value: int) -> pa.Table:
    """Lists of [queries, n] as rows. own: the number that each query leaves out, or NO_ROW."""
    kept = (numbers != PADDING) & (numbers != own[:, None])
    query = np.broadcast_to(np.arange(len(scores), dtype=np.int32)[:, None], scores.shape)[kept]
    data = {"value": np.full(len(query), value, np.int32), "query": query}
    return pa.table(data | {NUMBER: numbers[kept], "score": scores[kept]})


def lists_by_value(table: pa.Table, queries: int) -> dict[int, Lists]:
    """Merged lists as arrays. table: from LISTS.merge, which leaves the rows of a list together, best first."""
    table = table.filter(table["score"].is_valid())
    values, query, number, score = (table[name].to_numpy() for name in LISTS.columns)
    lists = {}
    for value in np.unique(values).tolist():
        rows = values == value
        scores, numbers = np.zeros((queries, MAX_CUT), np.float32), np.full((queries, MAX_CUT), PADDING, np.int64)
        place = query[rows], places_in_query(query[rows])
        scores[place], numbers[place] = score[rows], number[rows]
        lists[value] = scores, numbers
    return lists


class ExactScores:
    """The exact answers: the scores of each query's nearest vectors, float32 [queries, MAX_CUT], and those of pairs.

    counts: vectors that each query has, int64 [queries], at most MAX_CUT. pairs: PAIR_COLUMNS.
    """

    def __init__(self, nearest: Lists, pairs: pa.Table) -> None:
        self.scores, numbers = nearest
        self.counts = (numbers != PADDING).sum(axis=1)
        keys = _keys(pairs[NUMBER].to_numpy(), pairs["query"].to_numpy(), len(numbers))
        order = np.argsort(keys)
        self._keys, self._scores = keys[order], pairs["exact_score"].to_numpy()[order]

    def recall(self, lists: np.ndarray, cut: int) -> np.ndarray:
        """float64 [queries]: the recall of the first `cut` numbers of each list (int64 [queries, n], with PADDING).

        A number counts when its vector is as near as the `cut`-th nearest one. Raises RuntimeError for a pair without a score.
        """
        wanted = np.minimum(self.counts, cut)
        least = self.scores[np.arange(len(lists)), np.maximum(wanted - 1, 0)]
        query, rank = np.nonzero(lists[:, :cut] != PADDING)
        keys = _keys(lists[query, rank], query, len(lists))
        places = np.searchsorted(self._keys, keys)
        if len(keys) and (places.max() >= len(self._keys) or (self._keys[places] != keys).any()):
            raise RuntimeError(
                "a vector that the segments returned was not scored exactly. Delete _stages of the index, and start the command "
                "again"
            )
        hits = np.bincount(query[self._scores[places] >= least[query]], minlength=len(lists))
        return np.minimum(hits, wanted) / np.maximum(wanted, 1)


@dataclass(frozen=True)
class RecallPoint:
    """The recall at one value of the search parameter.

    recall: by cut of CUTS, the mean with the low and the high end of its 95 % interval. seconds: of a core, a query over all
    segments.
    """

    value: int
    recall: Mapping[int, tuple[float, float, float]]
    seconds: float


def recall_points(
    lists: Mapping[int, np.ndarray], exact: ExactScores, seconds: Mapping[int, float]
) -> list[RecallPoint]:
    """One of each value, the least first. seconds: of a core for all queries, by value."""
    queries, points = len(exact.counts), []
    for value in sorted(lists):
        by_query = np.stack([exact.recall(lists[value], cut) for cut in CUTS])
        bounds = bootstrap_interval(partial(_means, by_query), queries).tolist()
        rows = zip(CUTS, _means(by_query, np.arange(queries)).tolist(), bounds, strict=True)
        points.append(
            RecallPoint(value, {cut: (mean, *ends) for cut, mean, ends in rows}, seconds[value] / max(queries, 1))
        )
    return points


def _means(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mean over some rows of each line of values, float64 [lines]. values: [lines, rows]."""
    return values.take(rows, axis=1).mean(axis=1)


def advised_point(points: Sequence[RecallPoint], wanted: float) -> RecallPoint:
    """The least value (nprobe, efSearch) with this recall@10; where none has it, the least that comes near the highest recall@10."""
    highest = max(point.recall[10][0] for point in points)
    least = wanted if highest >= wanted else highest - TOLERANCE
    return next(point for point in points if point.recall[10][0] >= least)

"""Retrieval metrics as trec_eval defines them, for each query, and intervals of their means. numpy and pyarrow only.

NDCG has linear gains. A grade of 1 or more is relevant; an unjudged passage is not. A query without a relevant passage, or
without any retrieved passage, scores 0.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.bootstrap import bootstrap_interval
from ..data.ranking import rank_ids, top_k

CUTS = (1, 3, 5, 10, 20, 100, 1000)
MEASURES = ("ndcg", "map", "mrr", "recall", "precision")
NAMES = tuple(f"{measure}_at_{cut}" for measure in MEASURES for cut in CUTS)

Grades = Mapping[str, int]  # of passages, by id


def evaluate(qrels: Sequence[Grades], ranking: pa.Table) -> dict[str, np.ndarray]:
    """Every measure of NAMES, float64 [queries].

    ranking: rows in any order, with columns `query` (place in `qrels`), `passage` (id, large_string), `score` (float32).
    """
    ranks, ids = rank_ids(ranking["passage"].combine_chunks())
    queries, _, places = top_k(ranking["query"].to_numpy(), ranking["score"].to_numpy(), ranks, max(CUTS))
    ends = np.searchsorted(queries, np.arange(len(qrels) + 1))
    grades = np.zeros((len(qrels), max(CUTS)), np.int64)
    for row, judged in enumerate(qrels):
        listed = ids.take(pa.array(places[ends[row] : ends[row + 1]]))
        grades[row, : len(listed)] = _grades(judged, listed)
    return measures(grades, [np.array(list(judged.values()), np.int64) for judged in qrels])


def measures(grades: np.ndarray, judged: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every measure of NAMES, float64 [queries].

    grades: int [queries, max(CUTS)], of the retrieved passages, best first, 0 where there is none. judged: the grades of all
    judged passages of each query.
    """
    width = max(CUTS)
    ranks = np.arange(1, width + 1)
    discounts = 1 / np.log2(ranks + 1)
    gains = np.maximum(grades, 0)
    relevant = gains > 0
    total = np.array([np.count_nonzero(each > 0) for each in judged])
    ideal = np.zeros((len(judged), width))
    for row, each in enumerate(judged):
        top = np.sort(np.maximum(each, 0))[::-1][:width]
        ideal[row, : len(top)] = top
    hits = relevant.cumsum(axis=1)
    first = np.where(relevant.any(axis=1), relevant.argmax(axis=1) + 1, 2 * width)
    by_measure = {
        "ndcg": _ratio((gains * discounts).cumsum(axis=1), (ideal * discounts).cumsum(axis=1)),
        "map": _ratio((relevant * hits / ranks).cumsum(axis=1), total[:, None]),
        "mrr": np.where(first[:, None] <= ranks, 1 / first[:, None], 0.0),
        "recall": _ratio(hits, total[:, None]),
        "precision": hits / ranks,
    }
    return {f"{name}_at_{cut}": by_measure[name][:, cut - 1] for name in MEASURES for cut in CUTS}


def intervals(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % bootstrap intervals of the means, float64 [columns, 2]. values: [queries, columns]."""
    count = len(values)
    return bootstrap_interval(lambda rows: np.bincount(rows, minlength=count) @ values / count, count, seed)


def _grades(judged: Grades, ids: pa.Array) -> np.ndarray:
    """The grade of each id, 0 where it is not judged."""
    known = pa.array(judged, pa.large_string())
    place = pc.index_in(ids, value_set=known).fill_null(len(judged)).to_numpy(zero_copy_only=False)
    return np.array([*judged.values(), 0], np.int64)[place]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)

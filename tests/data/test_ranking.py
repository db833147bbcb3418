"""The k best rows of each query: as a plain sort gives them, ties too."""

import numpy as np
import pytest

from lib.data.ranking import best_of_repeats, places_in_query, top_k


def lists(seed, rows=400, queries=7, ids=60):
    """Rows in any order, of queries with few and many rows, scores with many ties; a query and an id may come repeatedly."""
    random = np.random.default_rng(seed)
    scores = random.integers(-4, 5, rows).astype(np.float32) / 8
    return random.integers(0, queries, rows) ** 2 % queries, scores, random.integers(0, ids, rows)


def plain(rows, k):
    """By a sort of tuples: score descending, id descending."""
    result = []
    for query in sorted({query for query, _, _ in rows}):
        result += sorted((row for row in rows if row[0] == query), key=lambda row: (-row[1], -row[2]))[:k]
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 1000])
def test_the_best_of_each_query(seed, k):
    rows = [each.tolist() for each in best_of_repeats(*lists(seed))]
    got = top_k(*map(np.array, rows), k)

    best = {}
    for query, score, rank in zip(*(each.tolist() for each in lists(seed)), strict=True):
        best[query, rank] = max(score, best.get((query, rank), score))
    expected = plain([(query, score, rank) for (query, rank), score in best.items()], k)
    assert list(zip(*(each.tolist() for each in got), strict=True)) == expected


def test_nothing_has_no_best():
    empty = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64)
    assert [len(each) for each in top_k(*best_of_repeats(*empty), 5)] == [0, 0, 0]
    assert len(places_in_query(empty[0])) == 0


def test_places_count_the_rows_of_a_query():
    """Rows of a query lie together; the queries come in any order."""
    assert places_in_query(np.array([3, 3, 0, 7, 7, 7])).tolist() == [0, 1, 0, 0, 1, 2]

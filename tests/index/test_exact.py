"""Exact top-k in memory: the right passages in the right order, ties too, by faiss and by torch."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from lib.data.ranking import keys, rank_ids, split, top_k
from lib.index.exact import topk as module
from lib.index.exact.topk import exact_top_k


@pytest.fixture(params=["faiss", "torch"])
def search(request, monkeypatch):
    """The function of a CPU worker, and that of a GPU worker on this CPU, in blocks smaller than the test's data."""
    if request.param == "faiss":
        return exact_top_k("cpu", 2)
    monkeypatch.setattr(module, "CUDA_BLOCK", (7, 100))
    return partial(module.ranked, module._torch("cpu"))


def by_full_sort(queries, passages, ranks, k):
    """The specification: every score, in float64 sums, sorted."""
    scores = (queries.astype(np.float64) @ passages.T.astype(np.float64)).astype(np.float32)
    return split(np.sort(keys(scores, ranks), axis=1)[:, ::-1][:, :k])


def test_passages_come_in_order(search):
    """Scores equal those of a full sort, for k below and above the number of passages; passages too, where scores differ."""
    random = np.random.default_rng(0)
    queries, passages = (random.standard_normal((n, 24)).astype(np.float32) for n in (30, 500))
    ranks = random.permutation(500)
    for k in (1, 10, 499, 500, 1000):
        scores, best = search(queries, passages, ranks, k)
        wanted, order = by_full_sort(queries, passages, ranks, k)
        assert scores.shape == best.shape == (30, min(k, 500))
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
        assert (best == order).mean() > 0.999  # two scores within a rounding may change places


def test_ties_go_by_id_even_where_the_list_ends(search):
    """Products of small whole numbers are exact and often equal: the order is trec_eval's to the last place, and the greater ids
    stay at the end of the list."""
    random = np.random.default_rng(1)
    queries, passages = (random.integers(-1, 2, (n, 6)).astype(np.float32) for n in (30, 500))
    ranks = random.permutation(500)
    for k in (1, 7, 50, 500):
        scores, best = search(queries, passages, ranks, k)
        wanted, order = by_full_sort(queries, passages, ranks, k)
        np.testing.assert_array_equal(scores, wanted)
        np.testing.assert_array_equal(best, order)


def test_nothing_to_search_gives_nothing(search):
    """No passages, or no queries: empty lists of the right shape."""
    some, none = np.ones((3, 4), np.float32), np.empty((0, 4), np.float32)
    assert search(some, none, np.empty(0, np.int64), 5)[0].shape == (3, 0)
    assert search(none, some, np.arange(3), 2)[0].shape == (0, 2)


def test_lists_merge_into_the_list_of_all():
    """The top k of rows in any order equals that of a full sort; a query may have fewer rows than others."""
    random = np.random.default_rng(2)
    queries = np.repeat(np.arange(6), [40, 0, 3, 500, 1, 7])
    scores = random.integers(-9, 9, len(queries)).astype(np.float32) / 8
    ranks = np.concatenate([random.permutation(600)[: np.count_nonzero(queries == q)] for q in range(6)])
    shuffled = random.permutation(len(queries))
    best = top_k(queries[shuffled], scores[shuffled], ranks[shuffled], 10)

    order = np.lexsort((-ranks, -scores, queries))
    place = np.concatenate([np.arange(n) for n in np.bincount(queries)])
    kept = order[place < 10]
    for result, wanted in zip(best, (queries[kept], scores[kept], ranks[kept]), strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_ids_are_ordered_by_their_bytes():
    """The order is that of strcmp: upper case before lower, Latin before Chinese, "10" before "9"; -0.0 ties with 0.0."""
    ids = ["b", "B", "中", "é", "10", "9", "b"]
    ranks, sorted_ids = rank_ids(pa.array(ids))
    assert sorted_ids.to_pylist() == sorted(set(ids), key=str.encode)
    assert [sorted_ids[rank].as_py() for rank in ranks] == ids
    assert keys(np.float32([-0.0]), np.array([1])) == keys(np.float32([0.0]), np.array([1]))

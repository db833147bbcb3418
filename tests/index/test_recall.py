"""The recall in the card of an index, where vectors are equal or nearly so."""

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.distance import cdist

from lib.index.build.codec import open_segment
from lib.index.build.recall import PADDING, ExactScores, pairs_of
from tests.support.indexed import DIM, built, clustered, cut_small, segments, write, write_many

EVERY = {"flat": {}, "hnsw": {}, "ivf-flat": {"lists": 8}}


def repeated(copies: int, rows: int = 2000) -> np.ndarray:
    return np.repeat(clustered(rows // copies, seed=3), copies, axis=0)[np.random.default_rng(0).permutation(rows)]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("copies", [5, 20, 200])
def test_of_equal_vectors_any_is_right(tmp_path, copies, metric, monkeypatch):
    """Exact search has recall 1 at every cut where each vector is there many times, in one segment or several."""
    vectors = repeated(copies) * (1 if metric == "cosine" else 7)
    cut_small(monkeypatch, 4 * DIM * 700)
    write_many(tmp_path / "in", vectors)
    card = built(tmp_path / "in", tmp_path / "out", kind="flat", metric=metric, shard_rows=300)

    assert card["segments"] > 1
    for cut in (1, 10, 100):
        assert card["recall"][0][f"recall@{cut}"] == [1, 1, 1]


@pytest.mark.parametrize("kind", EVERY)
def test_vectors_that_are_all_equal(tmp_path, kind):
    """All are found by any kind, and no longer codes are advised."""
    write(tmp_path / "in/0.parquet", np.repeat(clustered(1), 1000, axis=0))
    card = built(tmp_path / "in", tmp_path / "out", kind=kind, **EVERY[kind])

    assert card["recall"][-1]["recall@10"][0] == 1
    assert not any("was not reached" in note for note in card["notes"])


@pytest.mark.parametrize("offset", [0, 100])
def test_distances_of_vectors_far_from_nought(tmp_path, offset):
    """--metric l2 is measured as numpy does in float64, wherever the vectors lie: what codes cannot tell apart is not found."""
    vectors = clustered(2000) + np.float32(offset) * (np.arange(DIM) == 0)
    write(tmp_path / "in/0.parquet", vectors)
    card = built(tmp_path / "in", tmp_path / "out", kind="ivf-pq:code=2", lists=4, metric="l2")
    (file,) = (tmp_path / "out/_stages").glob("queries-*/queries.parquet")
    own = pq.read_table(file)["number"].to_numpy()
    apart = cdist(vectors[own].astype(np.float64), vectors.astype(np.float64))
    apart[np.arange(len(own)), own] = np.inf
    (segment,) = segments(tmp_path / "out")
    index = open_segment(str(segment))
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", 4)
    _, numbers = index.search(vectors[own], 101)
    for cut in (1, 10, 100):
        lists = [[n for n in row if n != mine][:cut] for row, mine in zip(numbers, own, strict=True)]
        least = np.sort(apart, axis=1)[:, cut - 1]
        hits = [(apart[query, row] <= least[query]).mean() for query, row in enumerate(lists)]

        assert card["recall"][-1][f"recall@{cut}"][0] == pytest.approx(np.mean(hits), abs=0.02)
        assert np.mean(hits) < 0.9


def test_a_farther_vector_is_no_hit():
    """A hit is as near as the last of the nearest; a farther vector, or padding, is none, whatever else the list has. A vector
    without an exact score ends the measurement."""
    scores = np.zeros((2, 100), np.float32)
    numbers = np.full((2, 100), PADDING)
    scores[0, :3], numbers[0, :3] = (0.9, 0.5, 0.5), (7, 3, 9)
    scores[1, :2], numbers[1, :2] = (0.8, 0.1), (3, 7)
    lists = np.array([[9, 4, 5], [7, PADDING, PADDING]])
    pairs = pairs_of([lists])
    assert pairs.to_pydict() == {"number": [4, 5, 7, 9], "query": [0, 0, 1, 0]}
    pairs = pairs.append_column("exact_score", pa.array([0.49, 0.5, 0.1, 0.5], pa.float32()))
    exact = ExactScores((scores, numbers), pairs)

    assert exact.recall(lists, 1).tolist() == [0, 0]
    assert exact.recall(lists, 2).tolist() == [0.5, 0.5]
    assert exact.recall(lists, 10).tolist() == [pytest.approx(2 / 3), 0.5]
    with pytest.raises(RuntimeError, match=r"was not scored exactly\. Delete _stages"):
        exact.recall(np.array([[9, 6], [7, PADDING]]), 10)

"""The nearest centroid, exactly, though bfloat16 finds it; and the k-means that makes them."""

import faiss
import numpy as np
import pytest
import torch

from lib.building import centroids as module
from lib.building.centroids import Centroids
from lib.building.kmeans import ITERATIONS, kmeans
from lib.models import load


def clustered(count: int, dim: int, seed: int) -> np.ndarray:
    """float32 [count, dim] about 40 centres, of mixed lengths."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, dim))
    points = centres[rng.integers(0, 40, count)] + 0.3 * rng.standard_normal((count, dim))
    return (points * rng.uniform(0.5, 2, (count, 1))).astype(np.float32)


def with_neighbours(given: np.ndarray) -> np.ndarray:
    """Each centroid, and two that lie a thousandth beside it."""
    noise = np.random.default_rng(7).standard_normal((2, *given.shape)).astype(np.float32)
    return np.concatenate([given, *(given + 1e-3 * noise)])


def plain(points: np.ndarray, given: np.ndarray, products: bool) -> np.ndarray:
    """Scores in float64, [n, count]."""
    scores = points.astype(np.float64) @ given.T.astype(np.float64)
    return scores if products else scores - (given.astype(np.float64) ** 2).sum(1) / 2


@pytest.fixture(params=["whole", "cut short"])
def cut(request, monkeypatch):
    """Whether the product is cut short: to a quarter of the dimensions, for no vectors too few."""
    if request.param == "cut short":
        free = dict.fromkeys(module.DEAR, (0, 0))
        for name, value in (("LEAST_CUT", 1), ("SHARES", (0.25,)), ("DEAR", free)):
            monkeypatch.setattr(module, name, value)
    return request.param == "cut short"


@pytest.mark.parametrize("many", [1, 10**9])
@pytest.mark.parametrize("type", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("products", [True, False])
def test_the_nearest_is_the_nearest(products, type, many, cut, monkeypatch):
    """The best of float64 sums, within a rounding of float32; among centroids that bfloat16 cannot tell apart, too."""
    monkeypatch.setattr(module, "LEAST_BLOCK", 70)
    monkeypatch.setattr(module, "SCORE_BYTES", 20_000)  # several blocks, and the last one short
    monkeypatch.setattr(module, "MANY", many)
    monkeypatch.setattr(load, "choose_dtype", lambda *_: type)
    points, given = clustered(3000, 48, seed=1), clustered(150, 48, seed=2)
    given = with_neighbours(given)
    one = Centroids(given, products)
    scores = plain(points, given, products)
    found = scores[np.arange(len(points)), one.nearest(points)]

    assert (one._axes is not None) == cut
    np.testing.assert_allclose(found, scores.max(1), atol=1e-5 * np.abs(scores).max())


def test_bfloat16_alone_would_be_wrong():
    """The products that are taken again matter: without them some vectors go to another centroid."""
    points, given = clustered(3000, 48, seed=1), clustered(150, 48, seed=2)
    given = with_neighbours(given)
    one = Centroids(given, products=True)
    if one._type is not torch.bfloat16:
        pytest.skip("this chip has no bfloat16")

    assert (one.about(points) != one.nearest(points)).mean() > 0.01


def test_equally_near_is_the_first(cut):
    """A vector of zeros, and centroids that are there twice."""
    given = clustered(20, 16, seed=3)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    twice = np.concatenate([given, given])

    assert Centroids(twice, products=True).nearest(np.zeros((3, 16), np.float32)).tolist() == [0, 0, 0]
    assert Centroids(twice, products=False).nearest(given).tolist() == list(range(20))
    assert Centroids(twice, products=True).nearest(given[:0]).tolist() == []


@pytest.mark.parametrize("products", [True, False])
def test_kmeans_is_as_good_as_faiss(products):
    """Held vectors lie as near to their centroids, within 2 %; the same sample, the same centroids; directions for products."""
    points, held = clustered(6000, 24, seed=4), clustered(2000, 24, seed=5)
    found = kmeans(points, 100, products)
    theirs = faiss.Kmeans(24, 100, niter=ITERATIONS, spherical=products, min_points_per_centroid=1)
    theirs.train(points)

    def error(given: np.ndarray) -> float:
        nearest = given[Centroids(given, products).nearest(held)]
        return float(-(held * nearest).sum(1).mean() if products else ((held - nearest) ** 2).sum(1).mean())

    assert error(found) <= error(theirs.centroids) + 0.02 * abs(error(theirs.centroids))
    np.testing.assert_array_equal(found, kmeans(points, 100, products))
    if products:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_every_centroid_gets_points():
    """More centroids than there are different points: each lies beside a point all the same."""
    different = clustered(10, 8, seed=6)
    found = kmeans(np.repeat(different, 30, axis=0), 25, products=False)
    apart = np.linalg.norm(found[:, None] - different, axis=2).min(axis=1)

    assert found.shape == (25, 8)
    assert (apart < 0.2 * np.linalg.norm(different, axis=1).min()).all()


def test_what_bfloat16_rounds_the_wrong_way_is_settled(cut):
    """Factors that are all rounded against the nearest: as far off as two products can be."""
    unit = 2.0**-8
    vector = np.array([[1 + unit + 2.0**-23, 1 + unit - 2.0**-23, 2.0**-9]], np.float32)
    given = np.array([[1 + unit + 2.0**-23, 0, 0], [0, 1 + unit - 2.0**-23, 2.0**-9]], np.float32)
    wide = [np.pad(array, ((0, 0), (0, 61))) for array in (vector, given)]
    many = np.concatenate([wide[1], np.full((62, 64), -1, np.float32)])  # so that the fast kernels are taken
    expected = plain(wide[0], many, products=True).argmax()

    assert Centroids(many, products=True).nearest(np.repeat(wide[0], 600, axis=0)).tolist() == [expected] * 600


@pytest.mark.parametrize("type", [torch.bfloat16, torch.float32])
def test_where_all_scores_are_negative(type, cut, monkeypatch):
    """Vectors that are nearer to the middle of all centroids than to any of these: the nearest all the same."""
    monkeypatch.setattr(load, "choose_dtype", lambda *_: type)
    given = clustered(200, 32, seed=11)
    points = given.mean(0) + 0.05 * clustered(500, 32, seed=12)
    scores = plain(points, given, products=False)
    of_middle = plain(points, given.mean(0, keepdims=True), products=False)[:, 0]
    one = Centroids(given, products=False)
    exact, about = (scores[np.arange(500), found] for found in (one.nearest(points), one.about(points)))

    assert (scores.max(1) < of_middle).mean() > 0.9
    np.testing.assert_allclose(exact, scores.max(1), atol=1e-5 * np.abs(scores).max())
    np.testing.assert_allclose(about, scores.max(1), atol=0.02 * np.abs(scores).max())


def test_far_from_the_origin_all_is_settled_quickly(cut):
    """Vectors around a point far away: what they share is taken off, and distances between them decide."""
    points, given = clustered(2000, 32, seed=8) + 500, clustered(64, 32, seed=9) + 500
    found = Centroids(given, products=False).nearest(points)
    scores = plain(points - 500, given - 500, products=False)

    assert (scores[np.arange(2000), found] >= scores.max(1) - 1e-3).all()

"""The nearest centroid, exactly, though bfloat16 finds it; and the k-means that makes them."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch

from lib.index.build import kmeans as kmeans_module
from lib.index.build import nearest_centroid as module
from lib.index.build import threads
from lib.index.build.kmeans import ITERATIONS, kmeans
from lib.index.build.nearest_centroid import Centroids
from lib.index.build.threads import Rotation
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
        free = dict.fromkeys(module.PAIR_AND_TURN, (0, 0))
        for name, value in (("LEAST_CUT", 1), ("SHARES", (0.25,)), ("PAIR_AND_TURN", free)):
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


@pytest.mark.parametrize("products", [True, False])
def test_no_score_lies_farther_above_its_bound_than_is_allowed_for(products, cut):
    """Of every vector and centroid, among them numbers that are all rounded the same way: else a nearest could be passed over."""
    signs = np.random.default_rng(3).choice([-1.0, 1.0], (1000, 64)).astype(np.float32)
    rounded_most = signs * (1 + 2.0**-8 * 0.999)
    given = np.concatenate([rounded_most[:50], -rounded_most[:50]])
    worst = 0.0
    for points, rows in ((rounded_most, given), (clustered(1000, 64, 1), with_neighbours(clustered(50, 64, 2)))):
        one = Centroids(rows, products)
        one.nearest(points)
        for moved, bounds in one._bounds(400, torch.from_numpy(points)):
            scores = moved.double() @ one._rows.double().T + one._half.double()
            allowed = torch.stack([one._margin(moved, column) for column in scores.float().T], 1)
            under = (scores - bounds.double()) / allowed
            worst = max(worst, float(under.max()))
            assert cut or float(under.min()) >= -1

    assert worst <= 1
    if one._type is torch.bfloat16 and not cut:
        assert worst > 0.4, "nothing here comes near to what is allowed for"


class Adverse(Centroids):
    """Every bound is as far off as is allowed for, and for the worse: the best one's too low, all others' too high."""

    def _bounds(self, block, points):
        self._unit = module.ROUNDING["bfloat16"]
        for moved, bounds in super()._bounds(block, points):
            scores = moved @ self._rows.T + self._half
            wrong = scores + 0.98 * torch.stack([self._margin(moved, column) for column in scores.T], 1)
            best = scores.argmax(1, keepdim=True)
            yield moved, wrong.scatter(1, best, 2 * scores.gather(1, best) - wrong.gather(1, best)).to(bounds.dtype)


@pytest.mark.parametrize("products", [True, False])
def test_bounds_that_are_off_as_far_as_is_allowed_for_mislead_nobody(products, cut, monkeypatch):
    """The nearest is found though its bound is too low, and those of others too high, by all that roundings could come to."""
    monkeypatch.setattr(load, "choose_dtype", lambda *_: torch.float32)
    points, given = clustered(3000, 48, seed=1), with_neighbours(clustered(150, 48, seed=2))
    scores = plain(points, given, products)
    found = Adverse(given, products).nearest(points)

    np.testing.assert_allclose(scores[np.arange(3000), found], scores.max(1), atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("spread", [0.0, 0.6, 1.0, "one"])
def test_lengths_may_differ(spread, cut):
    """Centroids up to a thousand times as long as others: the nearest by squared distance, and as good as that by rounded scores."""
    rng = np.random.default_rng(5)
    given = rng.standard_normal((500, 64)).astype(np.float32)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    if spread == "one":
        given[7] *= 1000
    else:
        given *= rng.lognormal(0, spread, (500, 1)).astype(np.float32)
    points = given[rng.integers(0, 500, 3000)] + 0.05 * rng.standard_normal((3000, 64)).astype(np.float32)
    distances = ((points.astype(np.float64)[:, None] - given) ** 2).sum(2)
    about = Centroids(given, products=False).about(points)

    assert (Centroids(given, products=False).nearest(points) != distances.argmin(1)).mean() < 1e-3
    assert (about != distances.argmin(1)).mean() < 0.01


def test_threads_find_the_same_and_are_left_as_they_were():
    """One thread or three, the same lists; and a thread that is started afterwards has torch compute as before."""
    points, given = clustered(2000, 48, seed=1), with_neighbours(clustered(150, 48, seed=2))
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            one = Centroids(given, products=False)
            found[threads] = np.concatenate([one.nearest(points), one.about(points)])
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

    np.testing.assert_array_equal(found[1], found[3])


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


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_kmeans_is_as_good_as_faiss(products, few):
    """Held vectors lie as near to their centroids, within 2 %, whether they lie apart in all directions or in few; the same sample,
    the same centroids; directions for products."""
    widths = np.linspace(2, 0.3, 24, dtype=np.float32) ** 2 if few else np.ones(24, np.float32)
    points, held = clustered(6000, 24, seed=4) * widths, clustered(2000, 24, seed=5) * widths
    assert (kmeans_module._along(*map(torch.from_numpy, (points, points)))[0].shape[1] < 24) == few
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


def test_what_all_points_share_does_not_hide_how_they_differ():
    """Around a point ten times as far away as they differ: centroids as good as around the origin, within 2 %."""
    points = clustered(6000, 24, seed=4) * np.linspace(2, 0.3, 24, dtype=np.float32) ** 2

    def error(far: float) -> float:
        moved = points + np.float32(far)
        given = kmeans(moved, 100, products=False)
        return float(((moved - given[Centroids(given, products=False).nearest(moved)]) ** 2).sum(1).mean())

    assert error(10 * float(points.std())) <= 1.02 * error(0)


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


@pytest.mark.parametrize("known", [True, False])
def test_vectors_are_turned_as_float32_turns_them(known, monkeypatch):
    """With oneDNN and where torch has none, in several parts and a short one, of a matrix that is not square."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: known)
    monkeypatch.setattr(threads, "TURNED", 70)
    points, matrix = (torch.from_numpy(clustered(count, dim, seed=3)) for count, dim in ((300, 48), (48, 20)))
    exact = points.double() @ matrix.double()

    for count in (0, 1, 70, 300):
        found = Rotation(matrix)(points[:count])
        np.testing.assert_allclose(found, exact[:count], atol=1e-5 * float(exact.abs().max()))

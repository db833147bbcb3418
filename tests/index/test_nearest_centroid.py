"""The nearest centroid: equal to the specification, though bfloat16 finds it; and k-means."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch

from lib.index.build import kmeans as kmeans_module
from lib.index.build import nearest_centroid as module
from lib.index.build import rotation
from lib.index.build.kmeans import ITERATIONS, kmeans
from lib.index.build.nearest_centroid import Centroids, nearest_exact, offsets_of
from lib.index.build.rotation import Rotation
from lib.models import load


def clustered(count: int, dim: int, seed: int) -> np.ndarray:
    """float32 [count, dim] about 40 centres, of mixed lengths."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, dim))
    points = centres[rng.integers(0, 40, count)] + 0.3 * rng.standard_normal((count, dim))
    return (points * rng.uniform(0.5, 2, (count, 1))).astype(np.float32)


def with_neighbours(centroids: np.ndarray) -> np.ndarray:
    """Each centroid, and two at a thousandth of its length beside it."""
    noise = np.random.default_rng(7).standard_normal((2, *centroids.shape)).astype(np.float32)
    return np.concatenate([centroids, *(centroids + 1e-3 * noise)])


def scores_in_float64(points: np.ndarray, centroids: np.ndarray, inner_product: bool) -> np.ndarray:
    """[n, count]: v . c, less |c|^2 / 2 for distances."""
    scores = points.astype(np.float64) @ centroids.T.astype(np.float64)
    return scores if inner_product else scores - (centroids.astype(np.float64) ** 2).sum(1) / 2


def specified(points: np.ndarray, centroids: np.ndarray, inner_product: bool) -> np.ndarray:
    """int64 [n]: `nearest_exact` in float64."""
    vectors, rows = (torch.from_numpy(each.astype(np.float64)) for each in (points, centroids))
    return nearest_exact(vectors, rows, offsets_of(rows, inner_product)).numpy()


def nearest(points: np.ndarray, centroids: np.ndarray, inner_product: bool = False) -> np.ndarray:
    """int64 [n]: by products that are cut short where that is quicker for these points."""
    return Centroids.for_vectors(centroids, inner_product, points).nearest(points)


@pytest.fixture(params=["whole", "cut short"])
def cut(request, monkeypatch):
    """Whether the product is cut short: to a quarter of the dimensions, however few centroids there are."""
    if request.param == "cut short":
        free = dict.fromkeys(module.PAIR_AND_ROTATION, (0, 0))
        for name, value in (("MIN_CUT", 1), ("KEPT_SHARES", (0.25,)), ("PAIR_AND_ROTATION", free)):
            monkeypatch.setattr(module, name, value)
    return request.param == "cut short"


@pytest.mark.parametrize("dense", [1, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inner_product", [True, False])
def test_the_nearest_is_the_nearest(inner_product, dtype, dense, cut, monkeypatch):
    """The best of float64 sums, within a rounding of float32; among centroids that bfloat16 cannot tell apart, too. Where no others
    are that near, the centroid of the specification."""
    monkeypatch.setattr(module, "MIN_BLOCK", 70)
    monkeypatch.setattr(module, "SCORE_BYTES", 20_000)  # several blocks, and the last one short
    monkeypatch.setattr(module, "DENSE", dense)
    monkeypatch.setattr(load, "choose_dtype", lambda *_: dtype)
    points, centroids = clustered(3000, 48, seed=1), clustered(150, 48, seed=2)
    centroids = with_neighbours(centroids)
    prepared = Centroids.for_vectors(centroids, inner_product, points)
    scores = scores_in_float64(points, centroids, inner_product)
    mine, wanted = prepared.nearest(points), specified(points, centroids, inner_product)
    rounding = 1e-5 * np.abs(scores).max()
    second = np.partition(scores, -2, axis=1)[:, -2]

    assert (prepared._axes is not None) == cut
    np.testing.assert_array_equal(wanted, scores.argmax(1))
    np.testing.assert_allclose(scores[np.arange(len(points)), mine], scores.max(1), atol=rounding)
    clear = scores.max(1) - second > 2 * rounding
    assert clear.mean() > 0.1
    np.testing.assert_array_equal(mine[clear], wanted[clear])


@pytest.mark.parametrize("inner_product", [True, False])
def test_no_score_lies_farther_above_its_bound_than_the_margin(inner_product, cut):
    """For all vectors and centroids, among them numbers that are all rounded the same way: else a nearest could be missed."""
    signs = np.random.default_rng(3).choice([-1.0, 1.0], (1000, 64)).astype(np.float32)
    rounded_most = signs * (1 + 2.0**-8 * 0.999)
    centroids = np.concatenate([rounded_most[:50], -rounded_most[:50]])
    worst = 0.0
    for points, rows in ((rounded_most, centroids), (clustered(1000, 64, 1), with_neighbours(clustered(50, 64, 2)))):
        prepared = Centroids.for_vectors(rows, inner_product, points)
        for moved, bounds in prepared._bounds(400, torch.from_numpy(points)):
            scores = moved.double() @ prepared._rows.double().T + prepared._offsets.double()
            allowed = torch.stack([prepared._margin(moved, column) for column in scores.float().T], 1)
            under = (scores - bounds.double()) / allowed
            worst = max(worst, float(under.max()))
            assert cut or float(under.min()) >= -1

    assert worst <= 1
    if prepared._dtype is torch.bfloat16 and not cut:
        assert worst > 0.4, "no bound here comes near the margin"


class Adverse(Centroids):
    """Every bound is wrong by nearly the margin, in the worse direction: the best one's too low, all others' too high."""

    def _bounds(self, block, points):
        self._unit = module.ROUNDING[torch.bfloat16]
        for moved, bounds in super()._bounds(block, points):
            scores = moved @ self._rows.T + self._offsets
            wrong = scores + 0.98 * torch.stack([self._margin(moved, column) for column in scores.T], 1)
            best = scores.argmax(1, keepdim=True)
            yield moved, wrong.scatter(1, best, 2 * scores.gather(1, best) - wrong.gather(1, best)).to(bounds.dtype)


@pytest.mark.parametrize("inner_product", [True, False])
def test_bounds_that_are_wrong_by_the_margin_do_no_harm(inner_product, cut, monkeypatch):
    """The nearest is right though its bound is too low, and those of others too high, by all that roundings could add up to."""
    monkeypatch.setattr(load, "choose_dtype", lambda *_: torch.float32)
    points, centroids = clustered(3000, 48, seed=1), with_neighbours(clustered(150, 48, seed=2))
    scores = scores_in_float64(points, centroids, inner_product)
    mine = Adverse.for_vectors(centroids, inner_product, points).nearest(points)

    np.testing.assert_allclose(scores[np.arange(3000), mine], scores.max(1), atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("spread", [0.0, 0.6, 1.0, "one"])
def test_lengths_may_differ(spread, cut):
    """Centroids up to a thousand times as long as others: the nearest by squared distance, and as good as that by rounded scores."""
    rng = np.random.default_rng(5)
    centroids = rng.standard_normal((500, 64)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    if spread == "one":
        centroids[7] *= 1000
    else:
        centroids *= rng.lognormal(0, spread, (500, 1)).astype(np.float32)
    points = centroids[rng.integers(0, 500, 3000)] + 0.05 * rng.standard_normal((3000, 64)).astype(np.float32)
    nearest_by_distance = scores_in_float64(points, centroids, inner_product=False).argmax(1)
    rounded = Centroids(centroids, inner_product=False).nearest_rounded(points)

    assert (nearest(points, centroids) != nearest_by_distance).mean() < 1e-3
    assert (rounded != nearest_by_distance).mean() < 0.01


def test_any_number_of_threads_gives_the_same_and_leaves_torch_as_it_was():
    """One thread or three, the same lists; and a thread that starts afterwards computes with torch's number of threads as before."""
    points, centroids = clustered(2000, 48, seed=1), with_neighbours(clustered(150, 48, seed=2))
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            prepared = Centroids(centroids, inner_product=False)
            results[threads] = np.concatenate([prepared.nearest(points), prepared.nearest_rounded(points)])
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

    np.testing.assert_array_equal(results[1], results[3])


def test_bfloat16_alone_would_be_wrong():
    """The second scoring in float32 matters: without it some vectors go to another centroid."""
    points, centroids = clustered(3000, 48, seed=1), clustered(150, 48, seed=2)
    centroids = with_neighbours(centroids)
    prepared = Centroids(centroids, inner_product=True)
    if prepared._dtype is not torch.bfloat16:
        pytest.skip("this chip has no bfloat16")

    assert (prepared.nearest_rounded(points) != prepared.nearest(points)).mean() > 0.01


def test_equally_near_is_the_first(cut):
    """A vector of zeros, and centroids that exist twice."""
    centroids = clustered(20, 16, seed=3)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    twice = np.concatenate([centroids, centroids])

    assert nearest(np.zeros((3, 16), np.float32), twice, inner_product=True).tolist() == [0, 0, 0]
    assert nearest(centroids, twice).tolist() == list(range(20))
    assert nearest(centroids[:0], twice, inner_product=True).tolist() == []


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("inner_product", [True, False])
def test_kmeans_is_as_good_as_faiss(inner_product, few):
    """Held-out vectors lie as near to their centroids, within 2 %, whether they vary in all directions or in few; the same sample,
    the same centroids; directions for inner products."""
    widths = np.linspace(2, 0.3, 24, dtype=np.float32) ** 2 if few else np.ones(24, np.float32)
    points, held_out = clustered(6000, 24, seed=4) * widths, clustered(2000, 24, seed=5) * widths
    assert (kmeans_module._project(*map(torch.from_numpy, (points, points)))[0].shape[1] < 24) == few
    ours = kmeans(points, 100, inner_product)
    theirs = faiss.Kmeans(24, 100, niter=ITERATIONS, spherical=inner_product, min_points_per_centroid=1)
    theirs.train(points)

    def error(centroids: np.ndarray) -> float:
        near = centroids[nearest(held_out, centroids, inner_product)]
        return float(-(held_out * near).sum(1).mean() if inner_product else ((held_out - near) ** 2).sum(1).mean())

    assert error(ours) <= error(theirs.centroids) + 0.02 * abs(error(theirs.centroids))
    np.testing.assert_array_equal(ours, kmeans(points, 100, inner_product))
    if inner_product:
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


def test_a_common_part_of_all_points_does_not_spoil_kmeans():
    """Around a point ten times as far away as they differ: centroids as good as around the origin, within 2 %."""
    points = clustered(6000, 24, seed=4) * np.linspace(2, 0.3, 24, dtype=np.float32) ** 2

    def error(far: float) -> float:
        moved = points + np.float32(far)
        centroids = kmeans(moved, 100, inner_product=False)
        return float(((moved - centroids[nearest(moved, centroids)]) ** 2).sum(1).mean())

    assert error(10 * float(points.std())) <= 1.02 * error(0)


def test_every_centroid_gets_points():
    """More centroids than there are different points: each lies beside a point all the same."""
    different = clustered(10, 8, seed=6)
    centroids = kmeans(np.repeat(different, 30, axis=0), 25, inner_product=False)
    apart = np.linalg.norm(centroids[:, None] - different, axis=2).min(axis=1)

    assert centroids.shape == (25, 8)
    assert (apart < 0.2 * np.linalg.norm(different, axis=1).min()).all()


def test_roundings_that_all_go_the_wrong_way(cut):
    """Factors that are all rounded against the nearest: the greatest error that two products can have."""
    unit = 2.0**-8
    vector = np.array([[1 + unit + 2.0**-23, 1 + unit - 2.0**-23, 2.0**-9]], np.float32)
    centroids = np.array([[1 + unit + 2.0**-23, 0, 0], [0, 1 + unit - 2.0**-23, 2.0**-9]], np.float32)
    wide = [np.pad(array, ((0, 0), (0, 61))) for array in (vector, centroids)]
    many = np.concatenate([wide[1], np.full((62, 64), -1, np.float32)])  # so that the fast kernels are taken
    expected = scores_in_float64(wide[0], many, inner_product=True).argmax()

    assert nearest(np.repeat(wide[0], 600, axis=0), many, inner_product=True).tolist() == [expected] * 600


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_where_all_scores_are_negative(dtype, cut, monkeypatch):
    """Vectors that are nearer to the mean of all centroids than to any centroid: the nearest all the same."""
    monkeypatch.setattr(load, "choose_dtype", lambda *_: dtype)
    centroids = clustered(200, 32, seed=11)
    points = centroids.mean(0) + 0.05 * clustered(500, 32, seed=12)
    scores = scores_in_float64(points, centroids, inner_product=False)
    of_mean = scores_in_float64(points, centroids.mean(0, keepdims=True), inner_product=False)[:, 0]
    prepared = Centroids.for_vectors(centroids, False, points)
    exact, rounded = (
        scores[np.arange(500), each] for each in (prepared.nearest(points), prepared.nearest_rounded(points))
    )

    assert (scores.max(1) < of_mean).mean() > 0.9
    np.testing.assert_allclose(exact, scores.max(1), atol=1e-5 * np.abs(scores).max())
    np.testing.assert_allclose(rounded, scores.max(1), atol=0.02 * np.abs(scores).max())


def test_far_from_the_origin(cut):
    """Vectors around a point far away: the common part is subtracted, and distances between them decide."""
    points, centroids = clustered(2000, 32, seed=8) + 500, clustered(64, 32, seed=9) + 500
    mine = nearest(points, centroids)
    scores = scores_in_float64(points - 500, centroids - 500, inner_product=False)

    assert (scores[np.arange(2000), mine] >= scores.max(1) - 1e-3).all()


@pytest.mark.parametrize("onednn", [True, False])
def test_a_rotation_is_the_product_in_float32(onednn, monkeypatch):
    """With oneDNN and where torch lacks it, in several blocks and a short one, of a matrix that is not square."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(rotation, "ROTATION_BLOCK", 70)
    points, matrix = (torch.from_numpy(clustered(count, dim, seed=3)) for count, dim in ((300, 48), (48, 20)))
    exact = points.double() @ matrix.double()

    for count in (0, 1, 70, 300):
        np.testing.assert_allclose(
            Rotation(matrix)(points[:count]), exact[:count], atol=1e-5 * float(exact.abs().max())
        )

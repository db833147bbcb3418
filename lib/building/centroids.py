"""The nearest of some centroids to many vectors, and the k-means that finds the centroids.

Both are one product of matrices. On chips with bfloat16 in hardware factors and scores are of that, at some four times the
speed of float32. How far a score can be off by it is known; so where others are nearer to the best than that, these and the best
are taken again in float32: the nearest is the one that float32 gives.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITERATIONS = 6  # of k-means; LOG.md has what more of them bring
SEED = 1234
SCORE_BYTES = 8 << 20  # at once for a thread: a core's cache has room for some of it
LEAST_BLOCK = 512  # vectors at once: for each block the centroids are read anew
SQUARE_COLUMNS = 2  # of half a square: what bfloat16 keeps of it, and what it keeps of the rest
UNKNOWN = -1
MANY = 16  # centroids that are near a vector, on average, from which on all are taken again
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}  # of a number, at most, relative
SLACK = 1.03  # for the roundings of roundings, of the lengths, and of the sums in float32
MOST_POINTS = 256  # for a centroid: more move it by less than they cost
SPLIT = 1 / 64  # how far the two halves of a cluster are moved apart, relative; bfloat16 must tell them apart


def compute_with(threads: int) -> None:
    """Of this process: faiss's threads, and torch's."""
    import faiss
    import torch

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)


class Centroids:
    """Those of an index or of a step of k-means. products: the nearest has the greatest product, else the least distance."""

    def __init__(self, centroids: np.ndarray, products: bool) -> None:
        """centroids: float32 [count, dim]."""
        import torch

        from ..models.load import choose_dtype

        # What is far from the origin is the same for all and would only be rounded: it is taken off both, or, where products
        # are asked for, off the centroids, whose order it leaves. Then the best score is seldom negative.
        middle = _tensor(centroids).mean(0)
        self._rows = _tensor(centroids) - middle
        lengths = self._rows.norm(dim=1)
        self._middle = torch.zeros_like(middle) if products else middle
        # |v - c|^2 is |v|^2 - 2 (v c - |c|^2 / 2)
        self._half = torch.zeros_like(lengths) if products else -lengths.square() / 2
        self._type = choose_dtype("auto", torch.device("cpu"))
        self._columns = _factors(self._rows, self._half, self._type).T
        self._unit = ROUNDING[str(self._type).removeprefix("torch.")]
        self._longest = float(lengths.max())

    def about(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest by scores as they are rounded, at two thirds of the cost."""
        return np.concatenate([_greatest(_ordered(scores)) for _, scores in self._scores(vectors)])

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest."""
        import torch

        found = torch.cat([self._settled(points, scores) for points, scores in self._scores(vectors)])
        for rows in (found == UNKNOWN).nonzero()[:, 0].split(LEAST_BLOCK):
            found[rows] = self._among_all(_tensor(vectors)[rows] - self._middle)
        return found.numpy()

    def _scores(self, vectors: np.ndarray) -> Iterator[tuple["Tensor", "Tensor"]]:
        """Some vectors and their scores with every centroid, [b, count], in a place that the next ones take."""
        import torch

        points, count = _tensor(vectors), len(self._rows)
        at_once = torch.get_num_threads() * SCORE_BYTES // (count * self._type.itemsize)
        block = max(1, min(len(points), max(LEAST_BLOCK, at_once)))
        rounded = torch.ones(block, len(self._columns), dtype=self._type)
        room = torch.empty(block, count, dtype=self._type)
        for part in points.split(block):
            moved = part - self._middle
            rounded[: len(part), :-SQUARE_COLUMNS] = moved
            yield moved, torch.mm(rounded[: len(part)], self._columns, out=room[: len(part)])

    def _settled(self, points: "Tensor", scores: "Tensor") -> "Tensor":
        """The nearest, or UNKNOWN where the best score may be negative in truth."""
        import torch

        ordered = _ordered(scores)
        found = torch.from_numpy(_greatest(ordered))
        best = scores.gather(1, found[:, None])[:, 0].float()
        least = best - self._margin(points, best)  # of a score that may be the best in truth
        floor = _ordered(least.clamp(min=0).to(self._type)) - 1  # which may have been rounded up
        ordered.scatter_(1, found[:, None], torch.iinfo(ordered.dtype).min)
        near = ((ordered.amax(1) >= floor) & (least >= 0)).nonzero()[:, 0]
        ordered[near, found[near]] = torch.iinfo(ordered.dtype).max
        some = points.index_select(0, near)  # many times as fast as points[near]
        found[near] = self._again(some, ordered.index_select(0, near).numpy() >= floor[near, None].numpy())
        return torch.where(least < 0, UNKNOWN, found)  # there the order of `ordered` is not that of scores

    def _margin(self, points: "Tensor", best: "Tensor") -> "Tensor":
        """How far two scores, each off by its factors' roundings and its own, can be out of order."""
        of_factors = 4 * self._longest * points.norm(dim=1) + self._unit * self._longest**2
        return SLACK * self._unit * (of_factors + 2 * best.abs())

    def _again(self, points: "Tensor", near: np.ndarray) -> "Tensor":
        """The nearest of some, near [b, count], in float32; the first of those that are equally near."""
        import torch

        # Five times as fast as torch's nonzero, twelve times as numpy's of two dimensions.
        places = np.divmod(np.flatnonzero(near), len(self._rows))
        rows, columns = map(torch.from_numpy, places)
        if len(rows) > MANY * len(points):
            return self._among_all(points)
        exact = (points.index_select(0, rows) * self._rows.index_select(0, columns)).sum(1) + self._half[columns]
        best = torch.full((len(points),), -torch.inf).scatter_reduce_(0, rows, exact, "amax")
        first = torch.full((len(points),), len(self._rows), dtype=torch.int64)
        kept = exact == best[rows]
        return first.scatter_reduce_(0, rows[kept], columns[kept], "amin")

    def _among_all(self, points: "Tensor") -> "Tensor":
        import torch

        return torch.from_numpy(torch.addmm(self._half, points, self._rows.T).numpy().argmax(1))


def _factors(rows: "Tensor", half: "Tensor", type: "torch.dtype") -> "Tensor":
    """[count, dim + SQUARE_COLUMNS]: rounded centroids and their halves, which ones beside a vector add to its score."""
    import torch

    kept = half.to(type)
    return torch.cat([rows.to(type), kept[:, None], (half - kept.float()).to(type)[:, None]], 1)


def _ordered(scores: "Tensor") -> "Tensor":
    """Their bits as whole numbers, among which numpy finds the greatest many times as fast as torch among bfloat16. Their order
    is that of the scores that are not negative; below lie the negative ones, in reverse."""
    import torch

    return scores.view(torch.int16 if scores.dtype is torch.bfloat16 else torch.int32)


def _greatest(ordered: "Tensor") -> np.ndarray:
    """int64 [n]: the place of each row's greatest score, the first of equals."""
    import torch

    threads, bits = torch.get_num_threads(), ordered.numpy()
    if threads == 1:
        return _greatest_of(bits)
    return np.concatenate(list(_pool(threads).map(_greatest_of, np.array_split(bits, threads))))


def _greatest_of(bits: np.ndarray) -> np.ndarray:
    places = bits.argmax(1)
    below = np.flatnonzero(bits[np.arange(len(bits)), places] < 0)
    places[below] = bits[below].argmin(1)
    return places


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _tensor(array: np.ndarray) -> "Tensor":
    """Without a copy where that can be. It is not written to, though torch warns that it could be."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def kmeans(points: np.ndarray, count: int, products: bool) -> np.ndarray:
    """float32 [count, dim]: Lloyd's iterations from points drawn at random; for products, directions of length 1.

    A centroid without points takes half of those of the greatest cluster, as in faiss.
    """
    import torch

    rng = np.random.default_rng(SEED)
    held = _tensor(points[:: max(1, len(points) // (MOST_POINTS * count))])
    centroids = held[torch.from_numpy(np.sort(rng.permutation(len(held))[:count]))]
    for _ in range(ITERATIONS):
        owners = torch.from_numpy(Centroids(_unit(centroids, products).numpy(), products).about(held.numpy()))
        sizes = torch.bincount(owners, minlength=count)
        centroids = torch.zeros_like(centroids).index_add_(0, owners, held) / sizes.clamp(min=1)[:, None]
        _split(centroids, sizes)
    return _unit(centroids, products).numpy()


def _unit(centroids: "Tensor", products: bool) -> "Tensor":
    import torch

    return torch.nn.functional.normalize(centroids) if products else centroids


def _split(centroids: "Tensor", sizes: "Tensor") -> None:
    """In place: what has no points becomes one half of the greatest cluster that is left."""
    import torch

    signs = 1 - 2 * (torch.arange(centroids.shape[1]) % 2)
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        greatest = int(sizes.argmax())
        centroids[empty] = centroids[greatest] * (1 + signs * SPLIT)
        centroids[greatest] *= 1 - signs * SPLIT
        sizes[empty] = sizes[greatest] // 2
        sizes[greatest] -= sizes[empty]

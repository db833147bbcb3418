"""The nearest of some centroids to many vectors, and the k-means that finds the centroids.

Both are one product of matrices. On chips with bfloat16 in hardware it is taken in that, with sums in float32, at some three
times the speed of float32. How far a product can be off by it is known; so where the second best is nearer than that, both are
taken again in float32: the nearest is the one that float32 gives.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 6  # of k-means; LOG.md has what more of them bring
SEED = 1234
PRODUCTS = 1 << 21  # at once for a thread: 8 MiB, which a core's cache has room for in part
LEAST_BLOCK = 512  # vectors at once: for each block the centroids are rounded anew
FEW_THREADS = 3  # up to which numpy's argmax on one is quicker than torch's max on all
MANY = 16  # centroids that are near a vector, on average, from which on all are taken again
ROUNDING = {"ieee": 0.0, "bf16": 2.0**-8}  # of a factor, at most, relative; "ieee" is float32
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
        # are asked for, off the centroids, whose order it leaves.
        self._middle = _tensor(centroids).mean(0)
        self.rows = _tensor(centroids) - self._middle
        lengths = self.rows.norm(dim=1)
        self._half = None if products else -lengths.square() / 2  # |v - c|^2 is |v|^2 - 2 (v c - |c|^2 / 2)
        half = choose_dtype("auto", torch.device("cpu")) is torch.bfloat16
        self._precision = "bf16" if half else "ieee"
        self._margin = 4.04 * ROUNDING[self._precision] * float(lengths.max())

    def about(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest by products as they are rounded, at two thirds of the cost."""
        return np.concatenate([_best(scores) for _, scores in self._scores(vectors)])

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest."""
        import torch

        return torch.cat([self._settled(points, scores) for points, scores in self._scores(vectors)]).numpy()

    def _scores(self, vectors: np.ndarray) -> Iterator[tuple["Tensor", "Tensor"]]:
        """Some vectors and their scores with every centroid, [b, count], in a place that the next ones take."""
        import torch

        points = _tensor(vectors)
        block = max(LEAST_BLOCK, torch.get_num_threads() * PRODUCTS // len(self.rows))
        room = torch.empty(min(block, len(points)), len(self.rows))
        for part in points.split(block):
            moved = part if self._half is None else part - self._middle
            yield moved, self._products(moved, self._precision, room[: len(part)])

    def _products(self, points: "Tensor", precision: str, room: "Tensor") -> "Tensor":
        import torch

        with _precision(precision):
            scores = torch.mm(points, self.rows.T, out=room)
        return scores if self._half is None else scores.add_(self._half)

    def _settled(self, points: "Tensor", scores: "Tensor") -> "Tensor":
        import torch

        found = torch.from_numpy(_best(scores))
        best = scores.gather(1, found[:, None])[:, 0]
        scores.scatter_(1, found[:, None], -np.inf)
        second = scores.amax(1)
        margin = self._margin * points.norm(dim=1)
        open_rows = (second > best - margin).nonzero()[:, 0]
        if len(open_rows):
            scores[open_rows, found[open_rows]] = best[open_rows]
            found[open_rows] = self._again(points[open_rows], scores[open_rows] >= (best - margin)[open_rows, None])
        return found

    def _again(self, points: "Tensor", near: "Tensor") -> "Tensor":
        """The nearest of some, near [b, count], in float32; the first of those that are equally near."""
        import torch

        rows, columns = near.nonzero(as_tuple=True)
        if len(rows) > MANY * len(points):
            room = torch.empty(len(points), len(self.rows))
            return torch.from_numpy(_best(self._products(points, "ieee", room)))
        exact = (points[rows] * self.rows[columns]).sum(1)
        if self._half is not None:
            exact += self._half[columns]
        best = torch.full((len(points),), -torch.inf).scatter_reduce_(0, rows, exact, "amax")
        first = torch.full((len(points),), len(self.rows), dtype=torch.int64)
        kept = exact == best[rows]
        return first.scatter_reduce_(0, rows[kept], columns[kept], "amin")


def _best(scores: "Tensor") -> np.ndarray:
    """int64 [n]: the place of each row's greatest. torch's max takes three times as long as numpy's argmax on one core."""
    import torch

    return scores.numpy().argmax(1) if torch.get_num_threads() <= FEW_THREADS else scores.max(1).indices.numpy()


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


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Of float32 products on CPUs inside the block."""
    import torch

    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, name
    try:
        yield
    finally:
        matmul.fp32_precision = before

"""The nearest of some centroids to many vectors, as float32 gives it, in a fraction of what its products take.

A vector is held against all centroids by one product of matrices. On chips with bfloat16 in hardware its factors and results are
of that, at some four times the speed of float32. How far each can be off is known; the few centroids that may be the nearest
after all are scored again in float32.

Where centroids are many the product is cut short, too: most of a score comes of the few directions in which centroids lie apart
most, and all others together add no more than a product of two lengths. So vectors are held against centroids in few dimensions
and a length, which bounds every score from above; and whatever is bounded by no less than the score of the best bounded is
scored in full.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SCORE_BYTES = 8 << 20  # at once for a thread: a core's cache has room for some of it
LEAST_BLOCK = 512  # vectors at once: for each block the centroids are read anew
SQUARE_COLUMNS = 2  # what bfloat16 keeps of a number that is added to a product, and what it keeps of the rest
LEAST_CUT = 1 << 20  # multiplications for a vector, from which on it is seen whether they are cut short
SHARES = 0.25, 0.3125, 0.375, 0.5  # of the dimensions, that may be kept
PROBED = 512  # vectors that tell how many: some have a hundred times as many near as most
# Multiplications that take as long as one of a score of its own, and as one of a turn to the axes, both in float32.
DEAR = {"amx": (512, 12), "bfloat16": (256, 6), "float32": (48, 1)}
MANY = 40  # where more than one centroid in so many may be the nearest, all are scored again
PAIRS = 4096  # scored again at once
ROUNDING = {"float32": 2.0**-18, "bfloat16": 2.0**-8}  # of a number, at most, relative; of float32 a sum's
LOST = 4e-6  # of a square, at most, where one sum in float32 is taken from another
SLACK = 1.03  # for the roundings of roundings, of the lengths, and of the sums in float32


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
        middle = as_tensor(centroids).mean(0)
        self._rows = as_tensor(centroids) - middle
        lengths = self._rows.norm(dim=1)
        self._middle = torch.zeros_like(middle) if products else middle
        # |v - c|^2 is |v|^2 - 2 (v c - |c|^2 / 2). The products with all centroids have a sum of 0, so that the greatest is not
        # negative: neither is the best score, if what is added to each product is not.
        self._added = torch.zeros_like(lengths) if products else (lengths.amax().square() - lengths.square()) / 2
        self._type = choose_dtype("auto", torch.device("cpu"))
        type = str(self._type).removeprefix("torch.")
        self._unit, self._speed = ROUNDING[type], type
        if type == "bfloat16" and torch.cpu.get_capabilities().get("amx_bf16"):
            self._speed = "amx"
        self._longest = float(lengths.max())
        self._cut = False
        self._axes: Tensor | None = None  # where the product is cut short
        self._columns = self._factors()

    def about(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest; or, where it costs less, one that is as near but for what is rounded."""
        points = self._ready(vectors)
        return _by_threads(self._about if self._axes is None else self._nearest, points)

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest, the first of those that are equally near."""
        return _by_threads(self._nearest, self._ready(vectors))

    def _ready(self, vectors: np.ndarray) -> "Tensor":
        """The vectors, the first of which tell whether the product is cut short."""
        points = as_tensor(vectors)
        if not self._cut and len(points) and self._rows.numel() >= LEAST_CUT:
            self._cut_for(points[:: -(-len(points) // PROBED)] - self._middle)
            self._cut = True
        return points

    def _cut_for(self, points: "Tensor") -> None:
        """Keep as many dimensions as are best for vectors like these: of more the product takes longer, with fewer more are near."""
        import torch

        (count, dim), (pair, turn) = self._rows.shape, DEAR[self._speed]
        axes = torch.linalg.eigh(self._rows.T @ self._rows).eigenvectors.flip(1)  # those of the greatest variance first
        scores, costs = points @ self._rows.T + self._added, {0: float(count * dim)}
        for kept in (int(dim * share) for share in SHARES):
            bounds = _folded(points, axes[:, :kept]) @ _folded(self._rows, axes[:, :kept]).T + self._added
            score = scores.gather(1, bounds.argmax(1)[:, None])
            near = (bounds >= score - self._margin(points, score[:, 0])[:, None]).sum() / len(points)
            costs[kept] = (count + turn * dim) * kept + pair * dim * (1 + float(near))
        if kept := min(costs, key=costs.__getitem__):
            self._axes = axes[:, :kept].contiguous()
            self._columns = self._factors()

    def _factors(self) -> "Tensor":
        """[width, count]: rounded centroids, and what is added to a product, which ones beside a vector add to it."""
        import torch

        rows = self._rows if self._axes is None else _folded(self._rows, self._axes)
        kept = self._added.to(self._type)
        rest = (self._added - kept.float()).to(self._type)
        return torch.cat([rows.to(self._type), kept[:, None], rest[:, None]], 1).T

    def _about(self, points: "Tensor") -> np.ndarray:
        return np.concatenate([_bits(bounds).argmax(1) for _, bounds in self._bounds(points)])

    def _nearest(self, points: "Tensor") -> np.ndarray:
        return np.concatenate([self._settled(moved, bounds) for moved, bounds in self._bounds(points)])

    def _bounds(self, points: "Tensor") -> Iterator[tuple["Tensor", "Tensor"]]:
        """Some vectors and their scores with every centroid, or what these are at most, [b, count], in a place that the next take."""
        import torch

        count = len(self._rows)
        block = max(1, min(len(points), max(LEAST_BLOCK, SCORE_BYTES // (count * self._type.itemsize))))
        rounded = torch.ones(block, len(self._columns), dtype=self._type)
        room = torch.empty(block, count, dtype=self._type)
        for part in points.split(block):
            moved = part - self._middle
            rounded[: len(part), :-SQUARE_COLUMNS] = moved if self._axes is None else _folded(moved, self._axes)
            yield moved, torch.mm(rounded[: len(part)], self._columns, out=room[: len(part)])

    def _settled(self, points: "Tensor", bounds: "Tensor") -> np.ndarray:
        """The nearest: the first, of the greatest bound, or one that is bounded by no less than what the first scores at least."""
        import torch

        bits = _bits(bounds)
        lines, first = torch.arange(len(points)), torch.from_numpy(bits.argmax(1))
        if self._axes is None:
            score = bounds.gather(1, first[:, None])[:, 0].float()
            least = score - 2 * self._margin(points, score)
        else:
            score = self._scores(points, lines, first)
            least = score - self._margin(points, score)
        floor = _bits(least.clamp(min=0).to(self._type)) - 1  # which may have been rounded up
        lost = (least < 0).nonzero()[:, 0]  # below 0 the order of bits is not that of bounds
        bits[lines.numpy(), first.numpy()] = np.iinfo(bits.dtype).min
        some = torch.from_numpy(np.flatnonzero((bits.max(1) >= floor) & (least >= 0).numpy()))
        first[some] = self._again(
            points.index_select(0, some), first[some], _bits(bounds.index_select(0, some)) >= floor[some, None]
        )
        first[lost] = self._among_all(points[lost])
        return first.numpy()

    def _again(self, points: "Tensor", first: "Tensor", near: np.ndarray) -> "Tensor":
        """The nearest in float32 of the first and those that are near, bool [n, count]; the first in place of equals."""
        import torch

        # Five times as fast as torch's nonzero, twelve times as numpy's of two dimensions.
        places = np.flatnonzero(near)
        if len(places) * MANY > near.size:
            return self._among_all(points)
        rows, columns = map(torch.from_numpy, np.divmod(places, len(self._rows)))
        rows, columns = torch.cat([torch.arange(len(points)), rows]), torch.cat([first, columns])
        scores = self._scores(points, rows, columns)
        best = torch.full((len(points),), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
        kept = scores == best[rows]
        return torch.full((len(points),), near.shape[1]).scatter_reduce_(0, rows[kept], columns[kept], "amin")

    def _margin(self, points: "Tensor", scores: "Tensor") -> "Tensor":
        """How far a bound can lie off, by its factors' roundings and its own."""
        of_factors = 2 * self._longest * points.norm(dim=1) + self._unit * self._longest**2 / 2
        return SLACK * self._unit * (of_factors + scores.abs())

    def _scores(self, points: "Tensor", rows: "Tensor", columns: "Tensor") -> "Tensor":
        """Of pairs, in float32."""
        import torch

        pairs = zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
        # index_select takes a quarter of the time of points[rows]
        products = [(points.index_select(0, some) * self._rows.index_select(0, those)).sum(1) for some, those in pairs]
        return torch.cat(products) + self._added[columns]

    def _among_all(self, points: "Tensor") -> "Tensor":
        import torch

        scores = (torch.addmm(self._added, part, self._rows.T) for part in points.split(LEAST_BLOCK))
        return torch.cat([torch.from_numpy(each.numpy().argmax(1)) for each in scores])


def _folded(points: "Tensor", axes: "Tensor") -> "Tensor":
    """[n, kept + 1]: along the axes ([dim, kept]), and the length of the rest, at least."""
    import torch

    kept, squares = points @ axes, points.square().sum(1)
    rest = (squares - kept.square().sum(1)).clamp(min=0) + LOST * squares
    return torch.cat([kept, rest.sqrt()[:, None]], 1)


def _bits(bounds: "Tensor") -> np.ndarray:
    """As whole numbers, in the same order from 0 on, and below 0 where they are: among these numpy finds the greatest many times as
    fast as torch among bfloat16."""
    import torch

    return bounds.view(torch.int16 if bounds.dtype is torch.bfloat16 else torch.int32).numpy()


def _by_threads(work: Callable[["Tensor"], np.ndarray], points: "Tensor") -> np.ndarray:
    """What torch and what numpy do of it by all of torch's threads, a part each."""
    import torch

    threads = torch.get_num_threads()
    parts = points.chunk(threads)
    return work(points) if threads == 1 or len(parts) == 1 else np.concatenate(list(_pool(threads).map(work, parts)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    import torch

    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def as_tensor(array: np.ndarray) -> "Tensor":
    """Without a copy where that can be. It is not written to, though torch warns that it could be."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))

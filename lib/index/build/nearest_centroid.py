"""The nearest of some centroids to many vectors, as float32 gives it, in a fraction of what its products take.

A vector is held against all centroids by one product of matrices. On chips with bfloat16 in hardware its factors and results are
of that, at some four times the speed of float32. How far each can be off is known; the few centroids that may be the nearest
after all are scored again in float32.

Where centroids are many the product is cut short, too: most of a score comes of the few directions in which centroids lie apart
most, and all others together add no more than a product of two lengths. So vectors are held against centroids in few dimensions
and a length, which bounds every score from above; and whatever is bounded by no less than the score of the best bounded is
scored in full.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .threads import Rotation, as_tensor, by_threads

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCORE_BYTES = 8 << 20  # at once for a thread: a core's cache has room for some of it
LEAST_BLOCK = 512  # vectors at once, of all threads: for each block the centroids are read anew
LEAST_PART = 64  # and of a thread
SQUARE_COLUMNS = 2  # what bfloat16 keeps of a number that is added to a product, and what it keeps of the rest
LEAST_CUT = 1 << 20  # multiplications for a vector, from which on it is seen whether they are cut short
SHARES = 0.25, 0.3125, 0.375, 0.5  # of the dimensions, that may be kept
PROBED = 512  # vectors that tell how many: some have a hundred times as many near as most
# Multiplications that take as long as one of a score of its own, and as one of a turn to the axes, both in float32.
PAIR_AND_TURN = {"amx": (512, 12), "bfloat16": (256, 2), "float32": (48, 1)}
MANY = 40  # where more than one centroid in so many may be the nearest, all are scored again
PAIRS = 512  # scored again at once
ROUNDING = {
    "float32": 2.0**-18,
    "bfloat16": 2.0**-8,
}  # of a number, relative: at most; of float32 a sum's, as good as always
LOST = 1e-5  # of a square, at most, where one sum in float32 is taken from another, along axes that float32 has made
SLACK = 1.03  # for the roundings of roundings, of the lengths, and of the sums in float32


class Centroids:
    """Those of an index or of a step of k-means. products: the nearest has the greatest product, else the least distance."""

    def __init__(self, centroids: np.ndarray, products: bool) -> None:
        """centroids: float32 [count, dim]."""
        import torch

        from ...models.load import choose_dtype

        # What is far from the origin is the same for all and would only be rounded: it is taken off both, or, where products
        # are asked for, off the centroids, whose order it leaves. Then the best score is seldom negative.
        middle = as_tensor(centroids).mean(0)
        self._rows = as_tensor(centroids) - middle
        lengths = self._rows.norm(dim=1)
        self._middle = torch.zeros_like(middle) if products else middle
        # |v - c|^2 is |v|^2 - 2 (v c - |c|^2 / 2)
        self._half = torch.zeros_like(lengths) if products else -lengths.square() / 2
        self._type = choose_dtype("auto", torch.device("cpu"))
        self._unit = ROUNDING[_name(self._type)]
        self._longest = float(lengths.max())
        self._axes: Rotation | None = None  # where the product is cut short
        self._decided = self._rows.numel() < LEAST_CUT
        self._columns = self._factors()

    def about(self, vectors: "np.ndarray | Tensor") -> np.ndarray:
        """int64 [n]: the nearest by scores as they are rounded: at less cost, and by whole products until `nearest` was called."""
        return by_threads(partial(self._about, self._block()), as_tensor(vectors))

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest, the first of those that are equally near. The first vectors decide whether products are cut."""
        points = as_tensor(vectors)
        if len(points) and not self._decided:
            self._choose_axes(points[:: -(-len(points) // PROBED)] - self._middle)
        return by_threads(partial(self._nearest, self._block()), points)

    def _choose_axes(self, points: "Tensor") -> None:
        """As many as are best for vectors like these: of more the product takes longer, with fewer more centroids are near."""
        import torch

        (count, dim), (pair, turn) = self._rows.shape, PAIR_AND_TURN[_speed(self._type)]
        axes = torch.linalg.eigh(self._rows.T @ self._rows).eigenvectors.flip(1)  # those of the greatest variance first
        costs = {0: float(count * dim)}
        for kept in {int(dim * share) for share in SHARES} - {0}:
            costs[kept] = (count + turn * dim) * kept + pair * dim * (1 + self._near(points, Rotation(axes[:, :kept])))
        if kept := min(costs, key=costs.__getitem__):
            self._axes = Rotation(axes[:, :kept])
            self._columns = self._factors()
        self._decided = True

    def _near(self, points: "Tensor", axes: Rotation) -> float:
        """Centroids of a vector, on average, that are to be scored in full where only these axes are kept."""
        found, columns = 0, _folded(self._rows, axes).T
        for part in points.split(LEAST_PART):
            bounds = _folded(part, axes) @ columns + self._half
            first = bounds.argmax(1)
            score = (part * self._rows[first]).sum(1) + self._half[first]
            found += int((bounds >= (score - self._margin(part, score))[:, None]).sum())
        return found / len(points)

    def _factors(self) -> "Tensor":
        """[width, count]: rounded centroids, and what is added to a product, which ones beside a vector add to it."""
        import torch

        rows = self._rows if self._axes is None else _folded(self._rows, self._axes)
        rounded = self._half.to(self._type)
        rest = (self._half - rounded.float()).to(self._type)
        return torch.cat([rows.to(self._type), rounded[:, None], rest[:, None]], 1).T

    def _block(self) -> int:
        """Vectors that a thread takes at once."""
        import torch

        least = max(LEAST_PART, LEAST_BLOCK // torch.get_num_threads())
        return max(least, SCORE_BYTES // (len(self._rows) * self._type.itemsize))

    def _about(self, block: int, points: "Tensor") -> np.ndarray:
        return np.concatenate([_greatest(_bits(bounds)) for _, bounds in self._bounds(block, points)])

    def _nearest(self, block: int, points: "Tensor") -> np.ndarray:
        return np.concatenate([self._settled(moved, bounds) for moved, bounds in self._bounds(block, points)])

    def _bounds(self, block: int, points: "Tensor") -> Iterator[tuple["Tensor", "Tensor"]]:
        """Some vectors and their scores with every centroid, or what these are at most, [b, count], in a place that the next take."""
        import torch

        block = max(1, min(len(points), block))
        rounded = torch.ones(block, len(self._columns), dtype=self._type)
        room = torch.empty(block, len(self._rows), dtype=self._type)
        for part in points.split(block):
            moved = part - self._middle
            rounded[: len(part), :-SQUARE_COLUMNS] = moved if self._axes is None else _folded(moved, self._axes)
            yield moved, torch.mm(rounded[: len(part)], self._columns, out=room[: len(part)])

    def _settled(self, points: "Tensor", bounds: "Tensor") -> np.ndarray:
        """The nearest: the first, of the greatest bound, or one that is bounded by no less than what the first scores at least."""
        import torch

        bits = _bits(bounds)
        lines, first = torch.arange(len(points)), torch.from_numpy(_greatest(bits))
        if self._axes is None:
            score = bounds.gather(1, first[:, None])[:, 0].float()
            least = score - 2 * self._margin(points, score)
        else:
            score = self._scores(points, lines, first)
            least = score - self._margin(points, score)
        floor = _bits(least.clamp(min=0).to(self._type)) - 1  # which may have been rounded up
        below = (least < 0).numpy()  # there the order of bits is not that of bounds
        bits[lines.numpy(), first.numpy()] = np.iinfo(bits.dtype).min
        some = np.flatnonzero((bits.max(1) >= floor) | below)
        kept, rows = torch.from_numpy(some), np.flatnonzero(below[some])
        held = bounds.index_select(0, kept)
        near = _bits(held) >= floor[some, None]
        near[rows] = (held[rows].float() >= least[some[rows], None]).numpy()
        first[kept] = self._again(points.index_select(0, kept), first[kept], near)
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
        return torch.cat(products) + self._half[columns]

    def _among_all(self, points: "Tensor") -> "Tensor":
        import torch

        scores = (torch.addmm(self._half, part, self._rows.T) for part in points.split(LEAST_BLOCK))
        return torch.cat([torch.from_numpy(each.numpy().argmax(1)) for each in scores])


def _folded(points: "Tensor", axes: Rotation) -> "Tensor":
    """[n, kept + 1]: along the axes, and the length of the rest, at least."""
    import torch

    along, squares = axes(points), points.square().sum(1)
    rest = (squares - along.square().sum(1)).clamp(min=0) + LOST * squares
    return torch.cat([along, rest.sqrt()[:, None]], 1)


def _bits(bounds: "Tensor") -> np.ndarray:
    """As whole numbers, among which numpy finds the greatest many times as fast as torch among bfloat16. Their order is that of the
    bounds that are not negative; below lie the negative ones, in reverse."""
    import torch

    return bounds.view(torch.int16 if bounds.dtype is torch.bfloat16 else torch.int32).numpy()


def _greatest(bits: np.ndarray) -> np.ndarray:
    """int64 [n]: the place of each row's greatest bound, the first of equals."""
    places = bits.argmax(1)
    below = np.flatnonzero(bits[np.arange(len(bits)), places] < 0)
    places[below] = bits[below].argmin(1)
    return places


def _name(type: "torch.dtype") -> str:
    return str(type).removeprefix("torch.")


def _speed(type: "torch.dtype") -> str:
    """Which of PAIR_AND_TURN this chip is of."""
    import torch

    amx = type is torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16")
    return "amx" if amx else _name(type)

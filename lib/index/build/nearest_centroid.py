"""The nearest centroid of each vector, equal to float32's answer, at a fraction of the cost of float32 products.

The score of centroid j for a vector v is

    s_j = v . c_j + o_j        o_j = 0 for inner products, -|c_j|^2 / 2 for distances

and the nearest has the greatest score: |v - c_j|^2 = |v|^2 - 2 s_j. `nearest_exact` computes just that: it is the specification.
`Centroids` computes bounds b_j with one matrix product in bfloat16, where the chip has it (about four times the speed of float32),
then scores in float32 only the few centroids that the bounds leave.

Whole products. Rounding to a relative unit u moves a score by at most

    |b_j - s_j| <= m(v) = 2 u |v| max|c| + u^2 max|c|^2 / 2 + u |s_j|

(the factors, by Cauchy-Schwarz; the offset, kept as two numbers; the result). With f the greatest bound, s_f >= b_f - m, so a
centroid j can only be the nearest where b_j >= b_f - 2 m.

Products cut short. With k orthonormal axes A, and r the length of what lies off them,

    v . c_j <= (A^T v) . (A^T c_j) + r(v) r(c_j)

so k + 1 columns in place of all dimensions bound each score from above: s_j <= b_j + m. The centroid f with the greatest bound is
scored in float32, and j can only be the nearest where b_j >= s_f - m. The best axes are those along which the centroids differ
most, and how many of them are worth their time depends on the vectors: `Centroids.for_vectors` tries a sample.
"""

from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .rotation import Rotation
from .threads import as_tensor, in_threads

SCORE_BYTES = 8 << 20  # of one thread's block of scores: a part of it stays in a core's cache
MIN_BLOCK = 512  # vectors of all threads' blocks together: every block reads all centroids again
MIN_THREAD_BLOCK = 64  # vectors of one thread's block
EXACT_BLOCK = 512  # vectors scored in float32 with all centroids at once
PAIR_BLOCK = 512  # pairs of a vector and a centroid scored in float32 at once
OFFSET_COLUMNS = 2  # an offset as bfloat16, and the rest of it as bfloat16: one alone would lose 16 of its bits
MIN_CUT = 1 << 20  # multiplications a vector, below which cutting products short cannot save the time of trying it
KEPT_SHARES = 0.25, 0.3125, 0.375, 0.5  # of the dimensions, tried as numbers of axes
PROBE_VECTORS = 512  # tried with each number of axes: some vectors have a hundred times as many candidates as most
# Multiplications that take as long as one of a pair's score in float32, and as one of a rotation in float32; measured a chip.
PAIR_AND_ROTATION = {"amx": (512, 12), "bfloat16": (256, 2), "float32": (48, 1)}
DENSE = 40  # above one candidate in so many centroids a whole float32 product is quicker than single pairs
# The greatest relative error of one rounding; of float32 that of a whole sum, which is as good in practice.
ROUNDING = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8}
# The greatest share of a squared length that is lost where two float32 sums are subtracted and the axes are float32 themselves.
NORM_ERROR = 1e-5
SLACK = 1.03  # over the margin: for roundings of roundings, of lengths, and of sums in float32


def offsets_of(centroids: Tensor, inner_product: bool) -> Tensor:
    """[count]: the number that is added to a centroid's product, so that the nearest has the greatest sum."""
    lengths = centroids.norm(dim=1)
    return torch.zeros_like(lengths) if inner_product else -lengths.square() / 2


def nearest_exact(vectors: Tensor, centroids: Tensor, offsets: Tensor) -> Tensor:
    """int64 [n], the specification: the centroid with the greatest score, all scores computed in the precision of the arguments."""
    scores = (torch.addmm(offsets, block, centroids.T) for block in vectors.split(EXACT_BLOCK))
    return torch.cat([torch.from_numpy(each.numpy().argmax(1)) for each in scores])


class Centroids:
    """The centroids of an index, or of a step of k-means, prepared for many look-ups."""

    def __init__(self, centroids: np.ndarray, inner_product: bool) -> None:
        """Prepare whole products. centroids: float32 [count, dim]. inner_product: the nearest has the greatest inner product, else
        the least distance."""
        from ...models.load import choose_dtype

        # A common part, far from the origin, would cost precision only. It is subtracted from centroids and vectors; for inner
        # products from the centroids alone, which keeps their order. The best score is then seldom negative.
        mean = as_tensor(centroids).mean(0)
        self._rows = as_tensor(centroids) - mean
        self._origin = torch.zeros_like(mean) if inner_product else mean
        self._offsets = offsets_of(self._rows, inner_product)
        self._max_length = float(self._rows.norm(dim=1).max())
        self._dtype = choose_dtype("auto", torch.device("cpu"))
        self._unit = ROUNDING[self._dtype]
        self._use(None)

    @classmethod
    def for_vectors(cls, centroids: np.ndarray, inner_product: bool, sample: np.ndarray) -> Self:
        """Prepare products cut short where that is quicker for vectors like those of `sample`, float32 [n, dim]."""
        prepared = cls(centroids, inner_product)
        if len(sample) and prepared._rows.numel() >= MIN_CUT:
            points = as_tensor(sample)[:: -(-len(sample) // PROBE_VECTORS)] - prepared._origin
            prepared._use(prepared._best_axes(points))
        return prepared

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """int64 [n]: the nearest centroid, the first of equally near ones."""
        return self._in_blocks(self._settle, vectors)

    def nearest_rounded(self, vectors: np.ndarray | Tensor) -> np.ndarray:
        """int64 [n]: the centroid with the greatest bound. Cheaper, and near enough for k-means with whole products."""
        return self._in_blocks(lambda points, bounds: _greatest(as_ordered_ints(bounds)), vectors)

    def _use(self, axes: Rotation | None) -> None:
        """Set the axes of the products (None: whole products), and the rounded factors, [width, count], that follow from them."""
        self._axes = axes
        rows = self._rows if axes is None else _folded(self._rows, axes)
        rounded = self._offsets.to(self._dtype)
        rest = (self._offsets - rounded.float()).to(self._dtype)
        self._factors = torch.cat([rows.to(self._dtype), rounded[:, None], rest[:, None]], 1).T

    def _best_axes(self, points: Tensor) -> Rotation | None:
        """The axes of least cost: with more of them the product takes longer, with fewer more centroids remain candidates."""
        (count, dim), (pair, rotation) = self._rows.shape, PAIR_AND_ROTATION[_speed(self._dtype)]
        axes = torch.linalg.eigh(self._rows.T @ self._rows).eigenvectors.flip(1)  # greatest variance first
        costs = {0: float(count * dim)}
        for kept in {int(dim * share) for share in KEPT_SHARES} - {0}:
            candidates = self._mean_candidates(points, Rotation(axes[:, :kept]))
            costs[kept] = (count + rotation * dim) * kept + pair * dim * (1 + candidates)
        kept = min(costs, key=costs.__getitem__)
        return Rotation(axes[:, :kept]) if kept else None

    def _mean_candidates(self, points: Tensor, axes: Rotation) -> float:
        """The mean number of centroids a vector that remain candidates along these axes."""
        candidates, columns = 0, _folded(self._rows, axes).T
        for block in points.split(MIN_THREAD_BLOCK):
            bounds = _folded(block, axes) @ columns + self._offsets
            first = bounds.argmax(1)
            score = (block * self._rows[first]).sum(1) + self._offsets[first]
            candidates += int((bounds >= (score - self._margin(block, score))[:, None]).sum())
        return candidates / len(points)

    def _in_blocks(self, choose: Callable[[Tensor, Tensor], np.ndarray], vectors: np.ndarray | Tensor) -> np.ndarray:
        """The results of a function of points and their bounds, for blocks of vectors in each of torch's threads."""
        least = max(MIN_THREAD_BLOCK, MIN_BLOCK // torch.get_num_threads())
        block = max(least, SCORE_BYTES // (len(self._rows) * self._dtype.itemsize))

        def choose_all(part: Tensor) -> np.ndarray:
            return np.concatenate([choose(points, bounds) for points, bounds in self._bounds(block, part)])

        return in_threads(choose_all, as_tensor(vectors))

    def _bounds(self, block: int, vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of vectors, less the origin, and their bounds, [b, count], in a buffer that the next block reuses."""
        block = max(1, min(len(vectors), block))
        factors = torch.ones(block, len(self._factors), dtype=self._dtype)
        buffer = torch.empty(block, len(self._rows), dtype=self._dtype)
        for part in vectors.split(block):
            points = part - self._origin
            factors[: len(part), :-OFFSET_COLUMNS] = points if self._axes is None else _folded(points, self._axes)
            yield points, torch.mm(factors[: len(part)], self._factors, out=buffer[: len(part)])

    def _settle(self, points: Tensor, bounds: Tensor) -> np.ndarray:
        """The nearest centroids: the ones with the greatest bounds, except where other candidates must be scored."""
        ints = as_ordered_ints(bounds)
        first = torch.from_numpy(_greatest(ints))
        least = self._least_bound(points, bounds, first)
        floor = as_ordered_ints(least.clamp(min=0).to(self._dtype)) - 1  # least may have been rounded up, by one step
        negative = (least < 0).numpy()  # the order of the integers does not hold for these
        rows = np.flatnonzero((_second_greatest(ints, first.numpy()) >= floor) | negative)
        open_rows = torch.from_numpy(rows)
        bounds = bounds.index_select(0, open_rows)
        candidates = as_ordered_ints(bounds) >= floor[rows, None]
        candidates[np.arange(len(rows)), first[open_rows].numpy()] = False  # scored anyway
        below = np.flatnonzero(negative[rows])
        candidates[below] = (bounds[below].float() >= least[rows[below], None]).numpy()
        first[open_rows] = self._best_of(points.index_select(0, open_rows), first[open_rows], candidates)
        return first.numpy()

    def _least_bound(self, points: Tensor, bounds: Tensor, first: Tensor) -> Tensor:
        """[n]: the bound that a centroid needs at least, where `first` has the greatest one."""
        lines = torch.arange(len(points))
        if self._axes is None:
            bound = bounds.gather(1, first[:, None])[:, 0].float()
            return bound - 2 * self._margin(points, bound)
        score = self._scores(points, lines, first)
        return score - self._margin(points, score)

    def _best_of(self, points: Tensor, first: Tensor, candidates: np.ndarray) -> Tensor:
        """The nearest in float32 among `first` and the candidates, bool [n, count]; the first of equals."""
        # On flat places: five times as fast as torch's nonzero, twelve times as numpy's of two dimensions.
        places = np.flatnonzero(candidates)
        if len(places) * DENSE > candidates.size:
            return nearest_exact(points, self._rows, self._offsets)
        rows, columns = map(torch.from_numpy, np.divmod(places, len(self._rows)))
        rows, columns = torch.cat([torch.arange(len(points)), rows]), torch.cat([first, columns])
        scores = self._scores(points, rows, columns)
        best = torch.full((len(points),), -torch.inf).scatter_reduce_(0, rows, scores, "amax")
        kept = scores == best[rows]
        return torch.full((len(points),), len(self._rows)).scatter_reduce_(0, rows[kept], columns[kept], "amin")

    def _margin(self, points: Tensor, scores: Tensor) -> Tensor:
        """[n]: m of the module's docstring, with some slack."""
        factors = 2 * self._max_length * points.norm(dim=1) + self._unit * self._max_length**2 / 2
        return SLACK * self._unit * (factors + scores.abs())

    def _scores(self, points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The float32 scores of pairs: points[rows] with centroids[columns]."""
        pairs = zip(rows.split(PAIR_BLOCK), columns.split(PAIR_BLOCK), strict=True)
        # index_select takes a quarter of the time of points[rows]
        products = [(points.index_select(0, row) * self._rows.index_select(0, column)).sum(1) for row, column in pairs]
        return torch.cat(products) + self._offsets[columns]


def _folded(points: Tensor, axes: Rotation) -> Tensor:
    """[n, kept + 1]: the coordinates along the axes, and an upper bound of the length of the rest."""
    along, squares = axes(points), points.square().sum(1)
    rest = (squares - along.square().sum(1)).clamp(min=0) + NORM_ERROR * squares
    return torch.cat([along, rest.sqrt()[:, None]], 1)


def as_ordered_ints(floats: Tensor) -> np.ndarray:
    """A view of floats as the integers of the same bits, in which numpy finds the greatest many times as fast as torch in bfloat16.

    Integers from floats that are not negative are in the order of the floats. Those from negative floats are all below 0, in the
    reverse order.
    """
    return floats.view(torch.int16 if floats.dtype is torch.bfloat16 else torch.int32).numpy()


def _greatest(ints: np.ndarray) -> np.ndarray:
    """int64 [n]: the column of each row's greatest float, seen `as_ordered_ints`; the first of equals."""
    columns = ints.argmax(1)
    negative = np.flatnonzero(ints[np.arange(len(ints)), columns] < 0)
    columns[negative] = ints[negative].argmin(1)
    return columns


def _second_greatest(ints: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[n]: the greatest integer of each row beside its column `first`.

    That column is overwritten and restored: to count all integers above a floor takes two to five times as long.
    """
    rows = np.arange(len(ints))
    values = ints[rows, first]
    ints[rows, first] = np.iinfo(ints.dtype).min
    second = ints.max(1)
    ints[rows, first] = values
    return second


def _speed(dtype: torch.dtype) -> str:
    """The key of PAIR_AND_ROTATION for this chip."""
    amx = dtype is torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16")
    return "amx" if amx else str(dtype).removeprefix("torch.")

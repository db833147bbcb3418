"""Inverted lists with RaBitQ (Gao and Long, arXiv 2405.12497; more bits: arXiv 2409.09913): a random rotation, then 1 to 4 bits
a dimension with an unbiased estimate of the product. Nothing to train but the lists.

The codes are made here, and read by faiss. Those of 1 bit are faiss's own, to the bit, in an eighth of the time. Those of more
hold a vector scaled, in even steps: faiss looks through every scale there is, by a sum that drifts; here a few are tried about
the one that suits normal variables best, which what is left of a rotated vector nearly is. LOG.md has what both take and keep.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import UsageError
from . import centroids_of

RECALL = {1: 0.60, 2: 0.76, 3: 0.86, 4: 0.92}
STEPS = {
    2: 0.9957,
    3: 0.5860,
    4: 0.3352,
}  # of a normal variable in 2**bits even steps, least squared error: Max, IRE IT-6, 1960
SCALES = 0.85, 0.925, 1.0, 1.075, 1.15  # times as many steps; the best is taken
BLOCK = 256  # vectors at once: a core's cache has room for them
TINY = np.finfo(np.float32).eps
NOTHING = 1e-10  # the length of a rest that is none
BOUND = np.float32(1.9)  # of the estimate's error, in deviations: faiss looks at the other bits of what lies within


@dataclass(frozen=True)
class IvfRabitq:
    """bits: a dimension. The rotation is one matrix for all; without it a few strong dimensions spoil the codes."""

    bits: int = 4
    lists: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    effort: ClassVar[str] = "nprobe"

    @property
    def recall(self) -> float:
        return RECALL[self.bits]

    def check(self, dim: int) -> None:
        if self.bits not in RECALL:
            raise UsageError(f"--kind ivf-rabitq:bits={self.bits}: choose from {', '.join(map(str, RECALL))}")

    def key(self, dim: int) -> str:
        return f"RR{dim},{{lists}},RaBitQ{self.bits if self.bits > 1 else ''}"

    def bytes(self, dim: int) -> float:
        return dim * self.bits / 8 + (8 if self.bits == 1 else 20)

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        import faiss

        centroids, products = centroids_of(inner), inner.metric_type == faiss.METRIC_INNER_PRODUCT
        found = np.empty((len(points), inner.code_size), np.uint8)
        for start in range(0, len(points), BLOCK):
            rows = slice(start, start + BLOCK)
            found[rows] = code(points[rows], centroids[lists[rows]], self.bits, products)
        return found

    def parameters(self, **chosen: Any) -> Any:
        import faiss

        return faiss.SearchParametersPreTransform(index_params=faiss.IVFRaBitQSearchParameters(**chosen))  # type: ignore[call-arg]

    def finished(self, index: Any) -> Any:
        return index


def code(points: np.ndarray, centroids: np.ndarray, bits: int, products: bool) -> np.ndarray:
    """uint8 [n, code] of rotated vectors and the centroid of each, both float32 [n, dim]: a bit a dimension and its factors; where
    there are more bits, these and theirs. products: for inner products, else for distances."""
    rests = points - centroids
    positive = rests > 0
    signs, factors = np.packbits(positive, axis=1, bitorder="little"), _sign_factors(points, rests, products)
    if bits == 1:
        return np.concatenate([signs, _bytes(factors[:, :2])], axis=1)
    levels, along, lengths = _levels(rests, bits)
    levels = np.where(positive, levels, np.uint8(2 ** (bits - 1) - 1) - levels)
    rescale = (1 if products else -2) * lengths / np.maximum(along, NOTHING)
    # faiss adds |rest|^2 to what it estimates of -2 <query, rest>; or <centroid, rest> to <query, rest>
    added = np.einsum("ij,ij->i", centroids if products else rests, rests)
    more = np.stack([added, rescale], axis=1).astype(np.float32)
    return np.concatenate([signs, _bytes(factors), _packed(levels, bits - 1), _bytes(more)], axis=1)


def _sign_factors(points: np.ndarray, rests: np.ndarray, products: bool) -> np.ndarray:
    """float32 [n, 3]: what the estimate by signs alone adds, what it is multiplied with, and how far it may be off."""
    dim = np.float32(rests.shape[1])
    across = np.ascontiguousarray(rests.T)
    squares, sums = _in_order(across * across), _in_order(np.abs(across))
    lengths, one = np.sqrt(squares), np.float32(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (
            sums * np.where(squares < TINY, one, one / lengths) * (one / np.sqrt(dim))
        )  # with the corner of the signs
        multipliers = np.where(cosines < TINY, one, one / cosines) * lengths
        half = np.float32(0.5) * sums
        spread = np.maximum(squares * (dim / 4) / (half * half) - one, 0) / max(dim - one, one)
        errors = np.where(half > TINY, lengths * BOUND * np.sqrt(spread), 0) * np.float32(1 if products else 2)
    added = squares - _in_order((points * points).T) if products else squares
    return np.stack([added, multipliers, errors], axis=1)


def _levels(rests: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels of the rests without their signs, uint8 [n, dim], at the scale that leaves them most alike; the levels' product with the
    rests of length 1, and the rests' lengths, [n]."""
    lengths = np.linalg.norm(rests, axis=1)
    units = np.abs(rests) / np.maximum(lengths, NOTHING)[:, None]
    most, scale = 2 ** (bits - 1) - 1, np.sqrt(rests.shape[1]) / STEPS[bits]
    best, along, levels = np.full(len(rests), -1.0), np.ones(len(rests)), np.zeros(rests.shape, np.uint8)
    for each in SCALES:
        tried = np.minimum(units * np.float32(each * scale), most).astype(np.uint8)
        values = tried + np.float32(0.5)
        product = np.einsum("ij,ij->i", values, units)
        alike = product / np.sqrt(np.einsum("ij,ij->i", values, values))
        better = alike > best
        best[better], along[better], levels[better] = alike[better], product[better], tried[better]
    return levels, along, lengths


def _in_order(values: np.ndarray) -> np.ndarray:
    """Of [dim, n] the sums, [n], each number added to those before it, as in faiss's loop."""
    return np.add.reduce(np.ascontiguousarray(values), axis=0)


def _packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, bytes]: so many bits of each, the least first."""
    planes = np.unpackbits(levels[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(planes.reshape(len(levels), -1), axis=1, bitorder="little")


def _bytes(factors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(factors, np.float32).view(np.uint8)


KIND = IvfRabitq

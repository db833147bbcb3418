"""Inverted lists with RaBitQ (Gao and Long, arXiv 2405.12497; more bits: arXiv 2409.09913): a random rotation, then 1 to 4 bits
a dimension with an unbiased estimate of the product. Nothing to train but the lists.

The codes are made here, and read by faiss. Those of 1 bit are faiss's own, to the bit where its loop adds as it is written (on x86),
in a quarter of the time. Those of more bits hold a vector scaled, in even steps: faiss looks through every scale there is, by a
sum that drifts; here a few are tried about the one that suits normal variables best, which what is left of a rotated vector nearly
is, in a quarter to a seventh of the time. LOG.md has what both keep of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UsageError
from . import QUERY_BITS, centroids_of

RECALL = {1: 0.60, 2: 0.76, 3: 0.86, 4: 0.92}
# Of a normal variable in 2**bits even steps, with the least squared error: Max, IRE Transactions on Information Theory 6, 1960.
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352}
SCALES = 0.85, 0.925, 1.0, 1.075, 1.15  # times as many steps; the best is taken
BLOCK = 256  # vectors at once: a core's cache has room for them
TINY = np.finfo(np.float32).eps
NOTHING = 1e-10  # the length of a rest that is none
BOUND = np.float32(1.9)  # of the estimate's error, in deviations: faiss looks at the other bits of what lies within


@dataclass(frozen=True)
class IvfRabitq:
    """bits: a dimension. The rotation is one matrix for all; without it a few strong dimensions spoil the codes."""

    bits: int = 4
    has_lists: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    search_parameter: ClassVar[str] = "nprobe"

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

        given = faiss.IVFRaBitQSearchParameters(qb=QUERY_BITS, **chosen)  # type: ignore[call-arg]
        return faiss.SearchParametersPreTransform(index_params=given)  # type: ignore[call-arg]

    def finished(self, index: Any) -> Any:
        return index


def code(points: np.ndarray, centroids: np.ndarray, bits: int, products: bool) -> np.ndarray:
    """uint8 [n, code] of rotated vectors and the centroid of each, both float32 [n, dim]: a bit a dimension and its factors; where
    there are more bits, these and theirs. products: for inner products, else for distances."""
    rests = points - centroids
    across = np.ascontiguousarray(rests.T)
    squares, positive = _in_order(across * across), rests > 0
    signs = np.packbits(positive, axis=1, bitorder="little")
    base = squares - _in_order((points * points).T) if products else squares
    factors = [base, *_sign_factors(across, squares, products)]
    if bits == 1:
        return np.concatenate([signs, _bytes(factors[:2])], axis=1)
    levels, along = _levels(np.abs(across), squares, bits)
    levels = np.ascontiguousarray(levels.T) ^ np.where(positive, np.uint8(0), np.uint8(2 ** (bits - 1) - 1))
    # faiss adds |rest|^2 to what it estimates of -2 <query, rest>; or <centroid, rest> to <query, rest>
    added = _in_order((centroids * rests).T) if products else squares
    rescale = (1 if products else -2) * np.sqrt(squares) / np.maximum(along, NOTHING)
    return np.concatenate([signs, _bytes(factors), _packed(levels, bits - 1), _bytes([added, rescale])], axis=1)


def _sign_factors(across: np.ndarray, squares: np.ndarray, products: bool) -> tuple[np.ndarray, np.ndarray]:
    """By how much the estimate by signs alone is multiplied, and how far it may be off, float32 [n]. across: rests, [dim, n]."""
    one, dim, sums = np.float32(1), np.float32(len(across)), _in_order(np.abs(across))
    lengths, half = np.sqrt(squares), np.float32(0.5) * sums
    with np.errstate(divide="ignore", invalid="ignore"):
        # With the corner of the cube that the signs name.
        cosines = sums * np.where(squares < TINY, one, one / lengths) * (one / np.sqrt(dim))
        multipliers = np.where(cosines < TINY, one, one / cosines) * lengths
        spread = np.maximum(squares * (dim / 4) / (half * half) - one, 0) / max(dim - one, one)
        errors = np.where(half > TINY, lengths * BOUND * np.sqrt(spread), 0)
    return multipliers, errors * np.float32(1 if products else 2)


def _levels(across: np.ndarray, squares: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels, uint8 [dim, n], of rests without their signs, at the scale that leaves them most alike; and the product of the levels
    with the rests of length 1, [n]."""
    units = across / np.maximum(np.sqrt(squares), NOTHING)
    most, scale = np.float32(2 ** (bits - 1) - 1), np.sqrt(len(across)) / STEPS[bits]
    best, along = (np.full(len(squares), each, np.float32) for each in (-1, 0))
    levels = np.zeros(units.shape, np.uint8)
    for each in SCALES:
        tried = np.minimum(units * np.float32(each * scale), most).astype(np.uint8)
        values = tried + np.float32(0.5)
        product = _in_order(values * units)
        alike = product / np.sqrt(_in_order(values * values))
        better = alike > best
        best, along, levels = (
            np.where(better, new, kept) for new, kept in ((alike, best), (product, along), (tried, levels))
        )
    return levels, along


def _in_order(values: np.ndarray) -> np.ndarray:
    """Of [dim, n] the sums, [n], each number added to those before it: as faiss does, whatever else is in the block."""
    count = values.shape[1]
    if count == 1:  # numpy adds a lone column by halves
        values = values.repeat(2, axis=1)
    return np.add.reduce(np.ascontiguousarray(values), axis=0)[:count]


def _packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, bytes] of levels, uint8 [n, dim]: so many bits of each, the least first."""
    count, dim = levels.shape
    words = np.pad(levels, [(0, 0), (0, -dim % 8)]).view(
        "<u8"
    )  # eight levels each, moved together by two, by four, by eight
    for width in (8, 16, 32):
        held = bits * width // 8
        mask = sum((1 << 2 * held) - 1 << start for start in range(0, 64, 2 * width))
        words = (words | words >> np.uint64(width - held)) & np.uint64(mask)
    packed = words[:, :, None].view(np.uint8)[:, :, :bits]
    return packed.reshape(count, -1)[:, : -(-dim * bits // 8)]


def _bytes(factors: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [n, 4 factors] of so many columns, as float32."""
    return np.stack(factors, axis=1, dtype=np.float32).view(np.uint8)


KIND = IvfRabitq

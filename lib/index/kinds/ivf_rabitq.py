"""Inverted lists with RaBitQ (Gao and Long, arXiv 2405.12497; more bits: arXiv 2409.09913): a random rotation, then 1 to 4 bits
a dimension with an unbiased estimate of the product. Only the lists are trained.

This module writes the codes, and faiss reads them: it is faiss's internal byte layout, so `check_layout` compares both once in
a process. 1-bit codes equal faiss's to the bit where its loop adds in the written order (on x86), in a quarter of the time. Codes of
more bits hold the scaled vector in even steps. faiss tries every scale that changes a step, with a running sum that drifts; here a
few scales are tried around the best one for normal variables, which the residuals of rotated vectors nearly are, in a quarter to a
seventh of the time. LOG.md compares their errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import faiss
import numpy as np

from ...errors import RunError, UsageError
from . import QUERY_BITS, IndexKind, centroids_of, empty_index, faiss_codes, lists_of

RECALL = {1: 0.60, 2: 0.76, 3: 0.86, 4: 0.92}
# Width of 2**bits even steps with the least squared error for a normal variable: Max, IRE Trans. Information Theory 6, 1960.
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352}
SCALES = 0.85, 0.925, 1.0, 1.075, 1.15  # multiples of that scale to try; each vector takes its best
BLOCK = 256  # vectors at once: they fit a core's cache
TINY = np.finfo(np.float32).eps
MIN_LENGTH = 1e-10  # of a residual: a vector on its centroid has none, and no direction
BOUND = np.float32(1.9)  # of a 1-bit estimate's error, in standard deviations: within it faiss reads the other bits too
TESTED_FAISS = "1.15.1"  # the version of constraints.txt, whose layout `code` writes
CHECKED_VECTORS, CHECKED_DIM, CHECKED_LISTS = 64, 60, 4  # of `check_layout`; 60: padding to whole bytes is compared too
MAX_ERROR = 1.5  # of our codes, relative to that of faiss's: 1.10 was the greatest seen (4 bits, 1,024 dimensions)


@dataclass(frozen=True)
class IvfRabitq(IndexKind):
    """bits: a dimension. One rotation matrix for all vectors; without it a few strong dimensions spoil the codes."""

    bits: int = 4

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
        inner_product = inner.metric_type == faiss.METRIC_INNER_PRODUCT
        check_layout(self.bits, inner_product)
        centroids, codes = centroids_of(inner), np.empty((len(points), inner.code_size), np.uint8)
        for start in range(0, len(points), BLOCK):
            rows = slice(start, start + BLOCK)
            codes[rows] = code(points[rows], centroids[lists[rows]], self.bits, inner_product)
        return codes

    def parameters(self, **chosen: Any) -> Any:
        inner = faiss.IVFRaBitQSearchParameters(qb=QUERY_BITS, **chosen)  # type: ignore[call-arg]
        return faiss.SearchParametersPreTransform(index_params=inner)  # type: ignore[call-arg]


@cache
def check_layout(bits: int, inner_product: bool) -> None:
    """Compare our codes of some random vectors with faiss's, once in a process. Raise RunError where faiss would misread ours."""
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((CHECKED_LISTS, CHECKED_DIM)).astype(np.float32)
    lists = np.arange(CHECKED_VECTORS) % CHECKED_LISTS
    vectors = centroids[lists] + rng.standard_normal((CHECKED_VECTORS, CHECKED_DIM)).astype(np.float32) / 2
    ours = code(vectors, centroids[lists], bits, inner_product)
    theirs = faiss_codes(_small_index(bits, inner_product, centroids), vectors, lists)
    if ours.shape == theirs.shape and _same_sign_codes(ours, theirs, 2 if bits == 1 else 3):
        index = _small_index(bits, inner_product, centroids)
        error, own_error = (_search_error(index, codes, lists, vectors) for codes in (ours, theirs))
        if error <= MAX_ERROR * own_error:
            return
    raise RunError(
        f"faiss {faiss.__version__} does not read RaBitQ codes as faiss {TESTED_FAISS} does, for which they are written here. "
        f"Install faiss-cpu=={TESTED_FAISS}, or choose another kind, such as --kind ivf-sq8"
    )


def _small_index(bits: int, inner_product: bool, centroids: np.ndarray) -> Any:
    index = empty_index(IvfRabitq(bits), CHECKED_DIM, CHECKED_LISTS, "ip" if inner_product else "l2")
    inner = lists_of(index)
    inner.quantizer.add(centroids)
    inner.is_trained = True
    inner.nprobe = CHECKED_LISTS
    return inner


def _same_sign_codes(ours: np.ndarray, theirs: np.ndarray, factors: int) -> bool:
    """Whether the first parts of the codes are equal: the signs, and the factors but for a sum's rounding."""
    signs = -(-CHECKED_DIM // 8)
    stop = signs + 4 * factors
    mine, wanted = (np.ascontiguousarray(codes[:, signs:stop]).view(np.float32) for codes in (ours, theirs))
    return bool((ours[:, :signs] == theirs[:, :signs]).all() and np.allclose(mine, wanted, rtol=1e-3))


def _search_error(index: Any, codes: np.ndarray, lists: np.ndarray, vectors: np.ndarray) -> float:
    """The mean squared error of the scores that faiss reads from codes, of all vectors, with the vectors as queries."""
    for number in range(CHECKED_LISTS):
        rows = np.flatnonzero(lists == number)
        entries = np.ascontiguousarray(codes[rows])
        index.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(entries))
    index.ntotal = len(codes)
    scores, numbers = index.search(vectors, len(codes))
    index.reset()
    exact = vectors @ vectors.T
    if index.metric_type == faiss.METRIC_L2:
        squares = np.diag(exact)
        exact = squares[:, None] - 2 * exact + squares
    return float(np.mean((scores - np.take_along_axis(exact, numbers, axis=1)) ** 2))


def code(points: np.ndarray, centroids: np.ndarray, bits: int, inner_product: bool) -> np.ndarray:
    """The codes of rotated vectors, uint8 [n, code]: signs and their factors; with more bits, then levels and theirs.

    points: float32 [n, dim]. centroids: of each point, float32 [n, dim]. inner_product: for inner products, else for distances.
    """
    residuals = points - centroids
    across = np.ascontiguousarray(residuals.T)
    squares, positive = _in_order(across * across), residuals > 0
    signs = np.packbits(positive, axis=1, bitorder="little")
    base = squares - _in_order((points * points).T) if inner_product else squares
    factors = [base, *_sign_factors(across, squares, inner_product)]
    if bits == 1:
        return np.concatenate([signs, _bytes(factors[:2])], axis=1)
    levels, along = _levels(np.abs(across), squares, bits)
    levels = np.ascontiguousarray(levels.T) ^ np.where(positive, np.uint8(0), np.uint8(2 ** (bits - 1) - 1))
    # faiss adds |residual|^2 to its estimate of -2 <query, residual>; or <centroid, residual> to that of <query, residual>
    added = _in_order((centroids * residuals).T) if inner_product else squares
    rescale = (1 if inner_product else -2) * np.sqrt(squares) / np.maximum(along, MIN_LENGTH)
    return np.concatenate([signs, _bytes(factors), _packed(levels, bits - 1), _bytes([added, rescale])], axis=1)


def _sign_factors(across: np.ndarray, squares: np.ndarray, inner_product: bool) -> tuple[np.ndarray, np.ndarray]:
    """The factor of an estimate by signs alone, and the bound of its error, float32 [n]. across: residuals, [dim, n]."""
    one, dim, sums = np.float32(1), np.float32(len(across)), _in_order(np.abs(across))
    lengths, half = np.sqrt(squares), np.float32(0.5) * sums
    with np.errstate(divide="ignore", invalid="ignore"):
        # Cosines with the cube's corner that has the same signs.
        cosines = sums * np.where(squares < TINY, one, one / lengths) * (one / np.sqrt(dim))
        multipliers = np.where(cosines < TINY, one, one / cosines) * lengths
        spread = np.maximum(squares * (dim / 4) / (half * half) - one, 0) / max(dim - one, one)
        errors = np.where(half > TINY, lengths * BOUND * np.sqrt(spread), 0)
    return multipliers, errors * np.float32(1 if inner_product else 2)


def _levels(across: np.ndarray, squares: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The levels of absolute residuals, uint8 [dim, n], at the scale with the best cosine; and the products of the levels with the
    normalized residuals, [n]."""
    units = across / np.maximum(np.sqrt(squares), MIN_LENGTH)
    most, scale = np.float32(2 ** (bits - 1) - 1), np.sqrt(len(across)) / STEPS[bits]
    best, along = (np.full(len(squares), value, np.float32) for value in (-1, 0))
    levels = np.zeros(units.shape, np.uint8)
    for each in SCALES:
        tried = np.minimum(units * np.float32(each * scale), most).astype(np.uint8)
        values = tried + np.float32(0.5)
        product = _in_order(values * units)
        cosine = product / np.sqrt(_in_order(values * values))
        better = cosine > best
        best, along, levels = (
            np.where(better, new, old) for new, old in ((cosine, best), (product, along), (tried, levels))
        )
    return levels, along


def _in_order(values: np.ndarray) -> np.ndarray:
    """The sums of [dim, n] over dim, [n], added from the first to the last: faiss's order, whatever else is in the block."""
    count = values.shape[1]
    if count == 1:  # numpy adds a single column in pairs
        values = values.repeat(2, axis=1)
    return np.add.reduce(np.ascontiguousarray(values), axis=0)[:count]


def _packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """The lowest `bits` bits of each level one after the other, uint8 [n, bytes], of uint8 [n, dim]."""
    count, dim = levels.shape
    words = np.pad(levels, [(0, 0), (0, -dim % 8)]).view("<u8")  # eight levels, packed in pairs, fours, then all
    for width in (8, 16, 32):
        used = bits * width // 8
        mask = sum((1 << 2 * used) - 1 << start for start in range(0, 64, 2 * width))
        words = (words | words >> np.uint64(width - used)) & np.uint64(mask)
    packed = words[:, :, None].view(np.uint8)[:, :, :bits]
    return packed.reshape(count, -1)[:, : -(-dim * bits // 8)]


def _bytes(factors: Sequence[np.ndarray]) -> np.ndarray:
    """Columns of float32 as bytes, uint8 [n, 4 columns]."""
    return np.stack(factors, axis=1, dtype=np.float32).view(np.uint8)


KIND = IvfRabitq

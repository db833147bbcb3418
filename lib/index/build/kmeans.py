"""k-means: the centroids of some vectors."""

from typing import TYPE_CHECKING

import numpy as np

from .nearest_centroid import Centroids
from .threads import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 6  # LOG.md has what more of them bring
VARIANCE = 0.8  # that all but the last of them see
AT_ONCE = 65_536  # points that are turned and summed, and that tell the axes
COPIED = 0.25  # of the points' bytes, at most, that lie in memory twice: half of their dimensions, in bfloat16
SEED = 1234
MOST_POINTS = 256  # for a centroid: more move it by less than they cost
SPLIT = 1 / 64  # how far the two halves of a cluster are moved apart, relative; bfloat16 must tell them apart


def kmeans(points: np.ndarray, count: int, products: bool) -> np.ndarray:
    """float32 [count, dim]: Lloyd's iterations from points drawn at random; for products, directions of length 1.

    By distances all but the last iteration see only the directions in which points lie farthest apart: half the time, and centroids
    no worse.
    A centroid without points takes half of those of the greatest cluster, as in faiss.
    """
    import torch

    rng = np.random.default_rng(SEED)
    held = as_tensor(points[:: max(1, len(points) // (MOST_POINTS * count))])
    centroids = held[torch.from_numpy(np.sort(rng.permutation(len(held))[:count]))]
    few, near = (held, centroids) if products else _along(held, centroids)
    for _ in range(ITERATIONS - 1):
        owners = torch.from_numpy(Centroids(_unit(near, products).numpy(), products).about(few))
        near = _means(few, owners, count)
    centroids = _unit(_means(held, owners, count), products)
    owners = torch.from_numpy(Centroids(centroids.numpy(), products).about(held))
    return _unit(_means(held, owners, count), products).numpy()


def _along(points: "Tensor", centroids: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Both less the points' mean, along their first axes, [n, kept], the points in bfloat16; as they are where these are too many."""
    import torch

    some = points[:: -(-len(points) // AT_ONCE)]
    middle = some.mean(0)
    axes = _axes(some - middle)
    if not axes.shape[1]:
        return points, centroids
    few = [((part - middle) @ axes).bfloat16() for part in points.split(AT_ONCE)]
    return torch.cat(few), (centroids - middle) @ axes


def _axes(points: "Tensor") -> "Tensor":
    """[dim, kept]: orthonormal columns along which VARIANCE of the points' squares lies; none where that takes over half of them."""
    import torch

    squares, axes = torch.linalg.eigh(points.T @ points)
    shares = squares.flip(0).clamp(min=0).cumsum(0)
    kept = int((shares < VARIANCE * shares[-1]).sum()) + 1
    return axes.flip(1)[:, : kept if 2 * kept <= len(axes) else 0].contiguous()


def _means(points: "Tensor", owners: "Tensor", count: int) -> "Tensor":
    """float32 [count, dim]: of each owner's points; what has none becomes half of the greatest cluster."""
    import torch

    sums, sizes = torch.zeros(count, points.shape[1]), torch.bincount(owners, minlength=count)
    for start in range(0, len(points), AT_ONCE):
        sums.index_add_(0, owners[start : start + AT_ONCE], points[start : start + AT_ONCE].float())
    means = sums / sizes.clamp(min=1)[:, None]
    _split(means, sizes)
    return means


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

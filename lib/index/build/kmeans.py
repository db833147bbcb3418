"""k-means: centroids for the lists of an index, or for the cells of a training sample."""

from typing import TYPE_CHECKING

import numpy as np

from .threads import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 6  # LOG.md has what more of them bring
VARIANCE = 0.8  # share of the variance that all iterations but the last one see
BLOCK = 65_536  # points projected or summed at once; as many determine the axes
COPIED = 0.25  # of the points' bytes, at most, copied in memory: half of their dimensions, in bfloat16
SEED = 1234
MOST_POINTS = 256  # a centroid: more of them cost more than they move it
SPLIT = 1 / 64  # relative distance between the halves of a split cluster: bfloat16 must tell them apart


def kmeans(points: np.ndarray, count: int, inner_product: bool) -> np.ndarray:
    """float32 [count, dim]: Lloyd's iterations from random points; for inner products, directions of length 1.

    By distances all iterations but the last one see only the axes of most variance: half the time, and centroids no worse.
    A centroid without points takes half of the points of the largest cluster, as in faiss.
    """
    import torch

    rng = np.random.default_rng(SEED)
    sample = as_tensor(points[:: max(1, len(points) // (MOST_POINTS * count))])
    centroids = sample[torch.from_numpy(np.sort(rng.permutation(len(sample))[:count]))]
    reduced, centroids = (sample, centroids) if inner_product else _project(sample, centroids)
    for _ in range(ITERATIONS - 1):
        owners = _owners(reduced, _normalized(centroids, inner_product), inner_product)
        centroids = _means(reduced, owners, count)
    centroids = _normalized(_means(sample, owners, count), inner_product)
    owners = _owners(sample, centroids, inner_product)
    return _normalized(_means(sample, owners, count), inner_product).numpy()


def _owners(points: "Tensor", centroids: "Tensor", inner_product: bool) -> "Tensor":
    """int64 [n]: the centroid of each point, as near as rounded scores tell."""
    import torch

    from .nearest_centroid import Centroids

    return torch.from_numpy(Centroids(centroids.numpy(), inner_product).nearest_rounded(points))


def _project(points: "Tensor", centroids: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Both less the points' mean, along the principal axes, [n, kept], the points in bfloat16. Unchanged where those are too many."""
    import torch

    some = points[:: -(-len(points) // BLOCK)]
    mean = some.mean(0)
    axes = _axes(some - mean)
    if not axes.shape[1]:
        return points, centroids
    projected = [((block - mean) @ axes).bfloat16() for block in points.split(BLOCK)]
    return torch.cat(projected), (centroids - mean) @ axes


def _axes(points: "Tensor") -> "Tensor":
    """[dim, kept]: the fewest principal axes, orthonormal columns, that have VARIANCE of the points' squares; none where that takes
    over half of the dimensions."""
    import torch

    squares, axes = torch.linalg.eigh(points.T @ points)
    shares = squares.flip(0).clamp(min=0).cumsum(0)
    kept = int((shares < VARIANCE * shares[-1]).sum()) + 1
    return axes.flip(1)[:, : kept if 2 * kept <= len(axes) else 0].contiguous()


def _means(points: "Tensor", owners: "Tensor", count: int) -> "Tensor":
    """float32 [count, dim]: the mean of each owner's points. An owner without points becomes half of the largest cluster."""
    import torch

    sums, sizes = torch.zeros(count, points.shape[1]), torch.bincount(owners, minlength=count)
    for start in range(0, len(points), BLOCK):
        sums.index_add_(0, owners[start : start + BLOCK], points[start : start + BLOCK].float())
    means = sums / sizes.clamp(min=1)[:, None]
    _split(means, sizes)
    return means


def _normalized(centroids: "Tensor", inner_product: bool) -> "Tensor":
    import torch

    return torch.nn.functional.normalize(centroids) if inner_product else centroids


def _split(centroids: "Tensor", sizes: "Tensor") -> None:
    """Split the largest remaining cluster, in place, for each centroid without points."""
    import torch

    signs = 1 - 2 * (torch.arange(centroids.shape[1]) % 2)
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        largest = int(sizes.argmax())
        centroids[empty] = centroids[largest] * (1 + signs * SPLIT)
        centroids[largest] *= 1 - signs * SPLIT
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]

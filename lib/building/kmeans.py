"""k-means: the centroids of some vectors."""

from typing import TYPE_CHECKING

import numpy as np

from .centroids import Centroids, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

ITERATIONS = 6  # LOG.md has what more of them bring
SEED = 1234
MOST_POINTS = 256  # for a centroid: more move it by less than they cost
SPLIT = 1 / 64  # how far the two halves of a cluster are moved apart, relative; bfloat16 must tell them apart


def kmeans(points: np.ndarray, count: int, products: bool) -> np.ndarray:
    """float32 [count, dim]: Lloyd's iterations from points drawn at random; for products, directions of length 1.

    A centroid without points takes half of those of the greatest cluster, as in faiss.
    """
    import torch

    rng = np.random.default_rng(SEED)
    held = as_tensor(points[:: max(1, len(points) // (MOST_POINTS * count))])
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

"""How a build computes with torch: by how many threads, and vectors turned by a matrix."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TYPE_CHECKING

import numpy as np

from ...engine.malloc import keep_large_blocks

if TYPE_CHECKING:
    from torch import Tensor

TURNED = 1024  # vectors at once: of more, what is between two steps leaves a core's cache


def compute_with(threads: int) -> None:
    """Of this process: faiss's threads, and torch's. Arrays of one size follow each other from here on: the heap keeps them."""
    import faiss
    import torch

    keep_large_blocks()
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)


class Rotation:
    """Vectors, float32 [n, dim], by a matrix. A vector's result may round otherwise where others are beside it.

    By oneDNN, where torch has it: MKL, which torch takes else, uses half of the width that chips of another maker have. 384 by 384 on
    an EPYC 1.3 us a vector in place of 2.7.
    """

    def __init__(self, matrix: "Tensor") -> None:
        """matrix: [dim, width]."""
        import torch

        self._matrix = matrix.T.contiguous()  # [width, dim]
        if torch.backends.mkldnn.is_available():
            self._matrix = self._matrix.to_mkldnn()

    def __call__(self, vectors: "Tensor") -> "Tensor":
        """[n, width]."""
        import torch

        if len(vectors) > TURNED:
            found = torch.empty(len(vectors), self._matrix.shape[0])
            for part, place in zip(vectors.split(TURNED), found.split(TURNED), strict=True):
                place.copy_(self(part))
            return found
        if self._matrix.is_mkldnn:
            return torch.nn.functional.linear(vectors.to_mkldnn(), self._matrix).to_dense()
        return vectors @ self._matrix.T


def by_threads(work: Callable[["Tensor"], np.ndarray], points: "Tensor") -> np.ndarray:
    """What torch and what numpy do of it by all of torch's threads, a part each."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or len(points) < threads:
        return work(points)
    return np.concatenate(list(_pool(threads).map(work, points.chunk(threads))))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads each of which has torch compute alone; the process's others do so as before."""
    import torch

    started = Barrier(threads)

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from here on it is this thread's own number
        started.wait()

    pool = ThreadPoolExecutor(threads, initializer=alone)
    list(pool.map(int, range(threads)))
    torch.set_num_threads(threads)
    return pool


def as_tensor(array: "np.ndarray | Tensor") -> "Tensor":
    """Without a copy where that can be. It is not written to, though torch warns that it could be."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))

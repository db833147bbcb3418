"""The threads of a build's computations."""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TYPE_CHECKING

import faiss
import numpy as np

from ...engine.malloc import keep_large_blocks

if TYPE_CHECKING:
    from torch import Tensor


def compute_with(threads: int) -> None:
    """Set the number of threads of faiss and torch in this process, and let malloc keep freed blocks: arrays of one size follow
    each other from here on."""
    import torch

    keep_large_blocks()
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)


def in_threads(function: Callable[["Tensor"], np.ndarray], vectors: "Tensor") -> np.ndarray:
    """The results of a function of torch and numpy, computed on a chunk of the vectors by each of torch's threads."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or len(vectors) < threads:
        return function(vectors)
    return np.concatenate(list(_pool(threads).map(function, vectors.chunk(threads))))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each run torch on one core; other threads of the process keep their number."""
    import torch

    started = Barrier(threads)

    def use_one_core() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # fixes the number for this thread alone
        started.wait()

    pool = ThreadPoolExecutor(threads, initializer=use_one_core)
    list(pool.map(int, range(threads)))
    torch.set_num_threads(threads)
    return pool


def as_tensor(array: "np.ndarray | Tensor") -> "Tensor":
    """A tensor of the same memory where possible. Nobody writes to it, so torch's warning about read-only arrays is ignored."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))

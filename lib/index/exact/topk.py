"""Exact top-k in memory: the passages with the greatest inner products with each query, ties by id as trec_eval breaks them.

faiss selects on CPUs, torch on GPUs. Neither defines which of equal scores it keeps at the end of a list. So each selects one more
than k, and a query whose last two scores are equal is ranked in full.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...data.ranking import keys, split

if TYPE_CHECKING:
    import torch

# Queries and passages of one matrix product on a CPU, so that its scores stay in the cache: 4 % faster than faiss's own 4096 and
# 1024 for 2,000 queries, 100,000 passages of 384 dimensions, top 1000.
CPU_BLOCK = 1024, 4096
CUDA_BLOCK = 4096, 131_072  # the same on a GPU: 2 GiB of scores

Top = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
ExactTopK = Callable[[np.ndarray, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def exact_top_k(device: str, threads: int) -> ExactTopK:
    """A function of queries [q, dim], passages [n, dim] (float32), ranks of the passages' ids (int [n]) and k.

    It returns scores (float32) and ranks (int64), both [q, min(k, n)], best first.
    """
    return partial(ranked, _faiss(threads) if device == "cpu" else _torch(device))


def ranked(
    top: Top, queries: np.ndarray, passages: np.ndarray, ranks: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The selection of `top` in the order of the keys of scores and ranks, as if every score had been sorted.

    All numbers must be finite.
    """
    k = min(k, len(passages))
    if not k or not len(queries):
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    scores, places = top(queries, passages, min(k + 1, len(passages)))
    best = ranks[places]
    equal = scores[:, :-1] == scores[:, 1:]
    for row in np.flatnonzero(equal.any(axis=1)):  # rows without equal scores are in order already
        tie_at_end = equal.shape[1] == k and equal[row, k - 1]
        key = keys(passages @ queries[row], ranks) if tie_at_end else keys(scores[row], best[row])
        scores[row], best[row] = split(np.sort(key)[::-1][: scores.shape[1]])
    return scores[:, :k], best[:, :k]


def _faiss(threads: int) -> Top:
    import faiss

    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = CPU_BLOCK
    # By default faiss compares few queries one by one: 300 of 384 dimensions in 3.4 s, not 0.2 s.
    faiss.cvar.distance_compute_blas_threshold = 1

    def top(queries: np.ndarray, passages: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return faiss.knn(queries, passages, k, metric=faiss.METRIC_INNER_PRODUCT)

    return top


def _torch(device: str) -> Top:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False

    def top(queries: np.ndarray, passages: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = CUDA_BLOCK
        blocks = [
            _block_top(torch.from_numpy(queries[start : start + rows]).to(device), passages, k, columns)
            for start in range(0, len(queries), rows)
        ]
        scores, places = zip(*blocks, strict=True)
        return np.concatenate(scores), np.concatenate(places)

    return top


def _block_top(queries: "torch.Tensor", passages: np.ndarray, k: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The best passages of one block of queries; the passages are copied to the device a block at a time."""
    import torch

    scores = queries.new_empty((len(queries), 0))
    places = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start in range(0, len(passages), columns):
        block = queries @ torch.from_numpy(passages[start : start + columns]).to(queries.device).T
        new, column = block.topk(min(k, block.shape[1]), dim=1)
        scores, places = torch.cat([scores, new], dim=1), torch.cat([places, column + start], dim=1)
        scores, kept = scores.topk(min(k, scores.shape[1]), dim=1)
        places = places.gather(1, kept)
    return scores.cpu().numpy(), places.cpu().numpy()

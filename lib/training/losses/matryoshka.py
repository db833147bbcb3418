"""Matryoshka: the sum of a loss at several lengths of the vectors, so that trained vectors can be truncated.

L = sum_d w_d inner(first d dimensions), truncated, then normalised (Kusupati et al. 2022, arXiv 2205.13147). Weights are 1 in
sentence-transformers; BGE and piccolo2 take the mean, w_d = 1 / number of lengths. Embeddings are gathered over the ranks once
for all lengths.
"""

from dataclasses import dataclass, replace
from typing import Any

from . import Batch, Tensor


@dataclass(frozen=True)
class Matryoshka:
    """dims: each from 1 to the model's. weights: one for each."""

    inner: Any
    dims: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def kind(self) -> str:
        return self.inner.kind

    def __call__(self, batch: Batch) -> Tensor:
        pairs = zip(self.weights, self.dims, strict=True)
        losses = [weight * self.inner(replace(batch, dim=dim)) for weight, dim in pairs]
        return sum(losses[1:], losses[0])

"""Matryoshka: the sum of a loss at several lengths of the vectors, so that trained vectors can be truncated.

L = sum_d w_d inner(first d dimensions), truncated, then normalised (Kusupati et al. 2022, arXiv 2205.13147). Weights are 1 by
default, as in sentence-transformers; BGE and piccolo2 take the mean, w_d = 1 / number of lengths. Embeddings are gathered over
the ranks once for all lengths.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from . import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Matryoshka:
    inner: Any
    dims: tuple[int, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims) < 1:
            raise UsageError(f"matryoshka dimensions {self.dims}: give one or more, each at least 1")
        if len(self.weights) not in (0, len(self.dims)):
            raise UsageError(f"{len(self.weights)} matryoshka weights for {len(self.dims)} dimensions: give one each")

    @property
    def kind(self) -> str:
        return self.inner.kind

    def __call__(self, batch: Batch) -> "Tensor":
        if max(self.dims) > (most := batch.queries.shape[-1]):
            raise UsageError(f"matryoshka dimension {max(self.dims)}: the model's vectors have {most}")
        weights = self.weights or (1.0,) * len(self.dims)
        losses = [weight * self.inner(batch.truncated(dim)) for weight, dim in zip(weights, self.dims, strict=True)]
        return sum(losses[1:], losses[0])


LOSS = Matryoshka

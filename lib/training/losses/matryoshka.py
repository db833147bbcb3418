"""Matryoshka: a loss of the vectors' leading dimensions, at several lengths, so that vectors can be cut after training.

L = sum_d w_d inner(first d dimensions), cut, then normalised (Kusupati et al. 2022, arXiv 2205.13147). The weights are 1 unless
given, as in sentence-transformers; BGE and piccolo2 take the mean, w_d = 1 / number of lengths. What is gathered is gathered
once for all lengths.
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
    def of(self) -> str:
        return self.inner.of

    def __call__(self, batch: Batch) -> "Tensor":
        if max(self.dims) > (most := batch.queries.shape[-1]):
            raise UsageError(f"matryoshka dimension {max(self.dims)}: the model's vectors have {most}")
        weights = self.weights or (1.0,) * len(self.dims)
        losses = [weight * self.inner(batch.cut(dim)) for weight, dim in zip(weights, self.dims, strict=True)]
        return sum(losses[1:], losses[0])


LOSS = Matryoshka

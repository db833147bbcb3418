"""Focal InfoNCE: rows that are solved already count less.

L = (1 - e^{-ce})^gamma ce, ce the cross entropy of InfoNCE, so that 1 - e^{-ce} is the share that the positive lacks
(360Zhinao-search's training code, gamma 2, temperature 0.02; the focus is that of Lin et al. 2017). The gradient flows
through the focus too, as theirs does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch
from .infonce import cross_entropies

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FocalInfoNCE:
    temperature: float = 0.02
    gamma: float = 2.0
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        entropies = cross_entropies(batch, self.temperature)
        lacking = -(-entropies).expm1()
        return self.weight * batch.rows.mean(lacking**self.gamma * entropies)


LOSS = FocalInfoNCE

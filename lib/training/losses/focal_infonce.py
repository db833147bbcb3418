"""Focal InfoNCE: give less weight to rows that the model already solves.

L = (1 - e^{-ce})^gamma ce, ce the cross entropy of InfoNCE; 1 - e^{-ce} is the softmax probability of all negatives
(360Zhinao-search's training code, gamma 2, temperature 0.02; the focal factor is that of Lin et al. 2017). The gradient flows
through the focal factor too, as in their code.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor
from .infonce import cross_entropies


@dataclass(frozen=True)
class FocalInfoNCE:
    temperature: float = 0.02
    gamma: float = 2.0
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        entropies = cross_entropies(batch, self.temperature)
        negative_probability = -(-entropies).expm1()
        return self.weight * batch.keys.global_mean(negative_probability**self.gamma * entropies)


LOSS = FocalInfoNCE

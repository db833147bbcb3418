"""InfoNCE in which a row's negatives share out a fixed weight among them, the near ones taking more.

L = -log e^{s+/t} / (e^{s+/t} + sum_j w_j e^{s_j/t}), w_j = N softmax_j(beta s_j) without gradient, N the number of the row's
negatives: the weights are 1 on average, whatever the cosines (importance weights of Robinson et al. 2021, arXiv 2010.04592,
without their debiasing). The third reading of Zhihui's unpublished loss; beta 1 is our choice.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch
from .infonce import negatives

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SelfNormalised:
    temperature: float = 0.02
    beta: float = 1.0
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        import torch

        scale = batch.scale(self.temperature)
        positive = (batch.unit_queries() * batch.unit(batch.passages[:, 0])).sum(-1)
        weighed = negatives(batch, scale, positive, hardness=self.beta)  # first: what it gathers has gradients
        with torch.no_grad():
            count = negatives(batch, torch.zeros_like(scale), positive)  # log N
            share = count - negatives(batch, torch.full_like(scale, self.beta), positive)
            share = share.masked_fill(count.isneginf(), 0.0)
        return self.weight * batch.rows.mean(torch.nn.functional.softplus(weighed + share - scale * positive))


LOSS = SelfNormalised

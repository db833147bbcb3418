"""InfoNCE with self-normalised hardness weights: a row's negatives weigh 1 on average, the closer ones more.

L = -log e^{s+/t} / (e^{s+/t} + sum_j w_j e^{s_j/t}), w_j = N softmax_j(beta s_j) without gradient, N the number of the row's
negatives (importance weights of Robinson et al. 2021, arXiv 2010.04592, without their
debiasing). The third reading of Zhihui's unpublished loss; beta 1 is our choice.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor
from .infonce import negatives


@dataclass(frozen=True)
class SelfNormalised:
    temperature: float = 0.02
    beta: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        import torch

        scale = batch.scale(self.temperature)
        positive = batch.positive_cosines()
        # First, because the tensors that it gathers and the batch keeps must have gradients.
        weighted = negatives(batch, scale, positive, hardness=self.beta)
        with torch.no_grad():
            log_count = negatives(batch, torch.zeros_like(scale), positive)
            log_norm = log_count - negatives(batch, torch.full_like(scale, self.beta), positive)
            log_norm = log_norm.masked_fill(log_count.isneginf(), 0.0)
        values = torch.nn.functional.softplus(weighted + log_norm - scale * positive)
        return self.weight * batch.keys.global_mean(values)


LOSS = SelfNormalised

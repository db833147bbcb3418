"""LambdaLoss: RankNet with each pair weighted by how much swapping it changes NDCG.

L = mean of -(mu w2_ij + w_ij) log2 sigmoid(sigma (s_i - s_j)) over the pairs with y_i > y_j of all rows of the global batch.
w_ij = |G_i - G_j| |1/D(r_i) - 1/D(r_j)| is LambdaRank's weight; w2_ij = |G_i - G_j| |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)| that
of NDCG-Loss2; G = (2^y - 1) / best DCG, D(r) = log2(1 + r), r the rank by the present scores, from 1 (Wang et al. 2018, CIKM,
NDCG-Loss2++, mu 10). y: the teacher's grades (below 0: no gain), or 1 and 0. Mean over pairs as in sentence-transformers.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import RERANKING, Scores, Tensor
from .bce import relevance
from .ranknet import mean_of_pairs


@dataclass(frozen=True)
class LambdaLoss:
    mu: float = 10.0
    sigma: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> Tensor:
        import math

        from torch.nn import functional

        scores = batch.float32_scores()
        margins = scores.unsqueeze(2) - scores.unsqueeze(1)
        losses = functional.softplus(-self.sigma * margins) / math.log(2)
        weights = _weights(scores.detach(), relevance(batch)[batch.keys.local], self.mu)
        return self.weight * mean_of_pairs(batch, weights * losses)


def _weights(scores: Tensor, labels: Tensor, mu: float) -> Tensor:
    """The weight mu w2 + w of each pair, [b, g, g]."""
    import torch

    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(scores.dtype) + 1
    gains = labels.to(scores.dtype).clamp(min=0).exp2() - 1
    discounts = torch.log2(1 + torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device))
    best = (gains.sort(dim=1, descending=True).values / discounts).sum(1)
    gains = gains / best.clamp(min=1e-10)[:, None]
    inverse = torch.log2(1 + ranks).reciprocal()
    lambda_rank = (inverse.unsqueeze(2) - inverse.unsqueeze(1)).abs()
    distance = (ranks.unsqueeze(2) - ranks.unsqueeze(1)).abs().clamp(min=1)  # the diagonal is no pair
    ndcg_loss2 = torch.log2(1 + distance).reciprocal() - torch.log2(2 + distance).reciprocal()
    return (mu * ndcg_loss2 + lambda_rank) * (gains.unsqueeze(2) - gains.unsqueeze(1)).abs()


LOSS = LambdaLoss

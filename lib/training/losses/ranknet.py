"""RankNet: pairwise logistic loss. Of two passages of a query, the more relevant one should have the higher score.

L = mean of log(1 + e^{-sigma (s_i - s_j)}) over the pairs with y_i > y_j of all rows of the global batch (Burges et al. 2005),
y the teacher's scores, or 1 for the positive and 0 for the negatives. All pairs weigh the same, as in
sentence-transformers, so a row with more distinct grades weighs more. Natural logarithm.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import RERANKING, Scores, Tensor
from .bce import relevance


@dataclass(frozen=True)
class RankNet:
    sigma: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> Tensor:
        from torch.nn import functional

        scores = batch.float32_scores()
        values = functional.softplus(-self.sigma * (scores.unsqueeze(2) - scores.unsqueeze(1)))
        return self.weight * mean_of_pairs(batch, values)


def mean_of_pairs(batch: Scores, values: Tensor) -> Tensor:
    """This rank's share of the mean over the global batch's pairs with y_i > y_j. values: of local pairs, [b, g, g]."""
    labels = relevance(batch)
    pairs = labels.unsqueeze(2) > labels.unsqueeze(1)
    total = values.masked_fill(~pairs[batch.keys.local], 0.0).sum()
    return total * batch.keys.world / pairs.sum().clamp(min=1)


LOSS = RankNet

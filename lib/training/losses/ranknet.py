"""RankNet: of two passages of a query, the more relevant one is to have the higher score.

L = mean of log(1 + e^{-sigma (s_i - s_j)}) over the pairs with y_i > y_j of all rows of the global batch (Burges et al. 2005),
y the teacher's scores, or 1 for the positive and 0 for the negatives. Every pair weighs the same, as in
sentence-transformers, so a row with more grades weighs more. Natural logarithm.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import RERANKING, Scores
from .bce import degrees

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankNet:
    sigma: float = 1.0
    weight: float = 1.0
    of: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> "Tensor":
        from torch.nn import functional

        scores = batch.precise()
        values = functional.softplus(-self.sigma * (scores.unsqueeze(2) - scores.unsqueeze(1)))
        return self.weight * mean_of_pairs(batch, values)


def mean_of_pairs(batch: Scores, values: "Tensor") -> "Tensor":
    """This rank's share of the mean of values, [b, g, g], over the pairs of the global batch with y_i > y_j."""
    labels = degrees(batch)
    pairs = labels.unsqueeze(2) > labels.unsqueeze(1)
    total = values.masked_fill(~pairs[batch.rows.here], 0.0).sum()
    return total * batch.rows.world / pairs.sum().clamp(min=1)


LOSS = RankNet

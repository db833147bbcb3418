"""Margin-MSE of a reranker: its margins between the positive and each negative are to be the teacher's.

L = mean_j ((s+ - s_j) - (y+ - y_j))^2 over the row's negatives, s the raw score, y the teacher's (Hofstätter et al. 2021,
arXiv 2010.02666).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import RERANKING, Scores
from .margin_mse import squared_margins

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScoreMarginMSE:
    weight: float = 1.0
    of: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> "Tensor":
        rows = batch.rows
        return self.weight * rows.mean(squared_margins(batch.precise(), rows.taught()[rows.here]))


LOSS = ScoreMarginMSE

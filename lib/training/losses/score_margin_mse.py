"""Margin-MSE of a reranker: match the teacher's margins between the positive and each negative.

L = mean_j ((s+ - s_j) - (y+ - y_j))^2 over the row's negatives, s the raw score, y the teacher's (Hofstätter et al. 2021,
arXiv 2010.02666).
"""

from dataclasses import dataclass
from typing import ClassVar

from . import RERANKING, Scores, Tensor
from .margin_mse import squared_margins


@dataclass(frozen=True)
class ScoreMarginMSE:
    weight: float = 1.0
    kind: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> Tensor:
        keys = batch.keys
        values = squared_margins(batch.float32_scores(), keys.teacher_scores()[keys.local])
        return self.weight * keys.global_mean(values)


LOSS = ScoreMarginMSE

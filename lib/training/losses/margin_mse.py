"""Margin-MSE: match the teacher's margins between the positive and each negative.

L = mean_j (scale (s+ - s_j) - (y+ - y_j))^2 over the row's own negatives, s the cosine, y the teacher's score (Hofstätter et
al. 2021, arXiv 2010.02666, on dot products). Cosines span 2, so raw teacher scores need a `scale`; the default 1 is our choice.
"""

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from . import EMBEDDING, Batch, Tensor


@dataclass(frozen=True)
class MarginMSE:
    scale: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        teacher = batch.keys.teacher_scores()[batch.keys.local]
        return self.weight * batch.keys.global_mean(squared_margins(self.scale * batch.own_cosines(), teacher))


def squared_margins(scores: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of each row's margins, [b]. Raises InputError for rows without a negative."""
    if scores.shape[1] < 2:
        raise InputError("this loss learns margins to negatives, and the rows have none: give the dataset negatives")
    teacher = teacher.to(scores.dtype)
    errors = (scores[:, :1] - scores[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
    return errors.square().mean(1)


LOSS = MarginMSE

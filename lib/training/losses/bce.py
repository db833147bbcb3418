"""Binary cross entropy of a reranker: each pair by itself, relevant or not, or relevant to a degree.

L = mean_j -(y_j log sigmoid(s_j) + (1 - y_j) log(1 - sigmoid(s_j))), y 1 for the positive and 0 for the negatives, or the
teacher's scores, from 0 to 1, where the data has them (the pointwise loss of monoBERT, Nogueira and Cho 2019).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from . import RERANKING, Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BCE:
    weight: float = 1.0
    of: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> "Tensor":
        from torch.nn import functional

        scores = batch.precise()
        labels = degrees(batch)[batch.rows.here].to(scores.dtype)
        if len(labels) and not (labels.min() >= 0 and labels.max() <= 1):
            raise InputError(
                f"bce wants scores from 0 to 1, and the dataset has {labels.min():g} to {labels.max():g}: "
                "rescale pos_scores and neg_scores, or take listwise-kl or score-margin-mse, which learn from raw scores"
            )
        values = functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        return self.weight * batch.rows.mean(values.mean(1))


def degrees(batch: Scores) -> "Tensor":
    """Of relevance, of all rows: the teacher's, or 1 for the positive and 0 for the negatives, [G, g]."""
    import torch

    rows = batch.rows
    if rows.teacher is not None:
        return rows.teacher
    labels = torch.zeros_like(rows.passage_keys, dtype=torch.float32)
    labels[:, 0] = 1.0
    return labels


LOSS = BCE

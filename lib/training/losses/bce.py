"""Binary cross entropy of a reranker: classify each pair by itself, as relevant or not, or to a degree.

L = mean_j -(y_j log sigmoid(s_j) + (1 - y_j) log(1 - sigmoid(s_j))), y 1 for the positive and 0 for the negatives, or the
teacher's scores, from 0 to 1, where the dataset has them (the pointwise loss of monoBERT, Nogueira and Cho 2019).
"""

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from . import RERANKING, Scores, Tensor


@dataclass(frozen=True)
class BCE:
    weight: float = 1.0
    kind: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> Tensor:
        from torch.nn import functional

        scores = batch.float32_scores()
        labels = relevance(batch)[batch.keys.local].to(scores.dtype)
        if len(labels) and not (labels.min() >= 0 and labels.max() <= 1):
            raise InputError(
                f"bce wants scores from 0 to 1, and the dataset has {labels.min():g} to {labels.max():g}: "
                "rescale pos_scores and neg_scores, or take listwise-kl or score-margin-mse, which learn from raw scores"
            )
        values = functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        return self.weight * batch.keys.global_mean(values.mean(1))


def relevance(batch: Scores) -> Tensor:
    """Relevance labels of all rows, [G, g]: the teacher's scores, or 1 for the positive and 0 for the negatives."""
    import torch

    keys = batch.keys
    if keys.teacher is not None:
        return keys.teacher
    labels = torch.zeros_like(keys.passage_keys, dtype=torch.float32)
    labels[:, 0] = 1.0
    return labels


LOSS = BCE

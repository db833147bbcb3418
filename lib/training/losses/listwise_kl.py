"""Distillation of a teacher's scores into a reranker: the softmax over a row's passages is to be the teacher's.

L = KL(softmax(y / teacher_temperature) || softmax(s / t)) over the row's passages, y the teacher's raw scores (ListNet's cross
entropy, Cao et al. 2007, less the teacher's entropy, a constant; bge-reranker-v2-gemma's distillation, both temperatures 1).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import RERANKING, Scores
from .kl import divergences

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ListwiseKL:
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    weight: float = 1.0
    of: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> "Tensor":
        rows = batch.rows
        values = divergences(batch.precise() / self.temperature, rows.taught()[rows.here], self.teacher_temperature)
        return self.weight * rows.mean(values)


LOSS = ListwiseKL

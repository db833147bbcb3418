"""Distil a teacher's scores into a reranker: match the teacher's softmax over a row's passages.

L = KL(softmax(y / teacher_temperature) || softmax(s / t)) over the row's passages, y the teacher's raw scores (ListNet's cross
entropy, Cao et al. 2007, minus the teacher's entropy, a constant; bge-reranker-v2-gemma's distillation, both temperatures 1).
"""

from dataclasses import dataclass
from typing import ClassVar

from . import RERANKING, Scores, Tensor
from .kl import divergences


@dataclass(frozen=True)
class ListwiseKL:
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> Tensor:
        keys = batch.keys
        teacher = keys.teacher_scores()[keys.local]
        values = divergences(batch.float32_scores() / self.temperature, teacher, self.teacher_temperature)
        return self.weight * keys.global_mean(values)


LOSS = ListwiseKL

"""Distil a teacher's scores into cosines: match the teacher's softmax over a row's passages.

L = KL(softmax(y / teacher_temperature) || softmax(s / t)) over the row's own passages, y the teacher's raw scores, s the
cosine (Hinton et al. 2015; BGE's `kl_div` at temperature 0.02, which leaves out the teacher's entropy, a constant).
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor


@dataclass(frozen=True)
class KL:
    temperature: float = 0.02
    teacher_temperature: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        teacher = batch.keys.teacher_scores()[batch.keys.local]
        logits = batch.scale(self.temperature) * batch.own_cosines()
        values = divergences(logits, teacher, self.teacher_temperature)
        return self.weight * batch.keys.global_mean(values)


def divergences(logits: Tensor, teacher: Tensor, teacher_temperature: float) -> Tensor:
    """KL divergence of each row, [b]: KL(softmax(teacher / teacher_temperature) || softmax(logits))."""
    from torch.nn import functional

    target = (teacher.to(logits.dtype) / teacher_temperature).softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)


LOSS = KL

"""Distillation of a teacher's scores into cosines: the student's softmax over a row's passages is to be the teacher's.

L = KL(softmax(y / teacher_temperature) || softmax(s / t)) over the row's own passages, y the teacher's raw scores, s the
cosine (Hinton et al. 2015; BGE's `kl_div` at temperature 0.02, which leaves out the teacher's entropy, a constant).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KL:
    temperature: float = 0.02
    teacher_temperature: float = 1.0
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        teacher = batch.rows.taught()[batch.rows.here]
        cosines = (batch.unit_passages() @ batch.unit_queries().unsqueeze(-1)).squeeze(-1)
        values = divergences(batch.scale(self.temperature) * cosines, teacher, self.teacher_temperature)
        return self.weight * batch.rows.mean(values)


def divergences(logits: "Tensor", teacher: "Tensor", teacher_temperature: float) -> "Tensor":
    """KL(softmax(teacher / teacher_temperature) || softmax(logits)) of each row, [b]."""
    from torch.nn import functional

    wanted = (teacher.to(logits.dtype) / teacher_temperature).softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1)


LOSS = KL

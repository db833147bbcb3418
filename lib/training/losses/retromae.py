"""RetroMAE: the mean over texts of the loss of encoder and decoder, which `training.models.retromae_model` computes for each text."""

from dataclasses import dataclass
from typing import ClassVar

from . import TEXT, Scores, Tensor


@dataclass(frozen=True)
class RetroMAELoss:
    weight: float = 1.0
    kind: ClassVar[str] = TEXT

    def __call__(self, batch: Scores) -> Tensor:
        return self.weight * batch.keys.global_mean(batch.scores[:, 0])


LOSS = RetroMAELoss

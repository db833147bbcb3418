"""RetroMAE's loss of a text, encoder and decoder together, as models.retromae computes it: the mean over the texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import TEXT, Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RetroMAELoss:
    weight: float = 1.0
    of: ClassVar[str] = TEXT

    def __call__(self, batch: Scores) -> "Tensor":
        return self.weight * batch.rows.mean(batch.scores[:, 0])


LOSS = RetroMAELoss

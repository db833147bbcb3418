"""InfoNCE of labelled texts: the own positive against the own negatives alone, whatever the dataset says of in-batch ones.

L = -log e^{s+/t} / (e^{s+/t} + sum_j e^{s_j/t}), j over the row's own passages: another row may be of the same class, so
it is no negative (piccolo2, arXiv 2405.06932, for classification and clustering: 10 negatives, t 0.05, weight 0.2).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch
from .infonce import cross_entropies

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Classification:
    temperature: float = 0.05
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        alone = replace(batch, rows=replace(batch.rows, in_batch=False))
        return self.weight * batch.rows.mean(cross_entropies(alone, self.temperature))


LOSS = Classification

"""InfoNCE of labelled texts: a row's positive against its own negatives, even in datasets with in-batch negatives.

L = -log e^{s+/t} / (e^{s+/t} + sum_j e^{s_j/t}), j over the row's own passages. Another row may have the same class, so
its passages are no negatives (piccolo2, arXiv 2405.06932, for classification and clustering: 10 negatives, t 0.05, weight 0.2).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor
from .infonce import cross_entropies


@dataclass(frozen=True)
class Classification:
    temperature: float = 0.05
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        own_only = replace(batch, keys=replace(batch.keys, in_batch=False))
        return self.weight * batch.keys.global_mean(cross_entropies(own_only, self.temperature))


LOSS = Classification

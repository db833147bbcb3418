"""InfoNCE with hardness weights: the closer a negative is to the query, the more it weighs.

L = -log e^{s+/t} / (e^{s+/t} + sum_j w_j e^{s_j/t}), w_j = e^{alpha sg(s_j)}, sg stop-gradient (Lan et al. 2025, arXiv
2503.04812, alpha 9 on in-batch negatives; EmbeddingGemma, arXiv 2509.20354, alpha 5 on hard ones). Here it applies
to all negatives: one reading of Zhihui's unpublished loss. sentence-transformers calls it hardness_mode="all_negatives".
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor
from .infonce import cross_entropies


@dataclass(frozen=True)
class HardnessInfoNCE:
    temperature: float = 0.02
    alpha: float = 9.0
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        return self.weight * batch.keys.global_mean(cross_entropies(batch, self.temperature, hardness=self.alpha))


LOSS = HardnessInfoNCE

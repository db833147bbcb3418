"""Listwise softmax cross entropy of a reranker: the positive against the negatives of its row.

L = -log e^{s+/t} / sum_j e^{s_j/t} over the row's passages (bge-reranker and bge-reranker-v2-gemma, t 1; ListNet with all
weight on one passage). Every row weighs the same, whatever its number of passages.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import RERANKING, Scores, Tensor


@dataclass(frozen=True)
class Listwise:
    temperature: float = 1.0
    weight: float = 1.0
    kind: ClassVar[str] = RERANKING

    def __call__(self, batch: Scores) -> Tensor:
        return self.weight * batch.keys.global_mean(-(batch.float32_scores() / self.temperature).log_softmax(-1)[:, 0])


LOSS = Listwise

"""CoSENT: of any two pairs of texts, the one with the higher label is to have the higher cosine.

L = log(1 + sum_{y_j > y_i} e^{(s_i - s_j)/t}) over all pairs of rows of the global batch, s the cosine of query and positive,
y its label (Su 2022; Huang et al. 2024, doi 10.1109/TASLP.2024.3402087; piccolo2 takes t 0.05 and weight 0.04). Equal labels
make no pair. With labels sorted, the rows above one are a prefix: O(n log n).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CoSENT:
    temperature: float = 0.05
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        labels = batch.rows.taught()[:, 0]
        cosines = (batch.unit_queries() * batch.unit(batch.passages[:, 0])).sum(-1)
        return self.weight * _disorder(batch.scale(self.temperature) * batch.gather(cosines), labels)


def _disorder(scores: "Tensor", labels: "Tensor") -> "Tensor":
    """log(1 + sum of e^{s_i - s_j} where label j is above label i), []."""
    import torch

    falling, order = labels.sort(descending=True)
    scores = scores[order]
    above = torch.searchsorted(-falling, -falling)  # how many labels are higher: the first of them all
    beaten = (-scores).logcumsumexp(0)
    some = above > 0
    terms = scores[some] + beaten[above[some] - 1]
    return torch.cat([scores.new_zeros(1), terms]).logsumexp(0)


LOSS = CoSENT

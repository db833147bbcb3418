"""CoSENT: rank pairs of texts by label. Of any two pairs, the one with the higher label should have the higher cosine.

L = log(1 + sum_{y_j > y_i} e^{(s_i - s_j)/t}) over all pairs of rows of the global batch, s the cosine of query and positive,
y its label (Su 2022; Huang et al. 2024, doi 10.1109/TASLP.2024.3402087; piccolo2 takes t 0.05 and weight 0.04). Pairs with
equal labels do not count. After sorting by label, the rows with higher labels are a prefix, so the sum costs O(n log n).
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor


@dataclass(frozen=True)
class CoSENT:
    temperature: float = 0.05
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        labels = batch.keys.teacher_scores()[:, 0]
        scores = batch.scale(self.temperature) * batch.gather(batch.positive_cosines())
        return self.weight * _log_misordering(scores, labels)


def _log_misordering(scores: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum of e^{s_i - s_j} over the pairs with label j above label i), []."""
    import torch

    descending, order = labels.sort(descending=True)
    scores = scores[order]
    higher = torch.searchsorted(-descending, -descending)  # number of rows with a higher label: the first `higher` rows
    prefix_sums = (-scores).logcumsumexp(0)
    has_pairs = higher > 0
    terms = scores[has_pairs] + prefix_sums[higher[has_pairs] - 1]
    return torch.cat([scores.new_zeros(1), terms]).logsumexp(0)


LOSS = CoSENT

"""InfoNCE: the positive against hard negatives and, in datasets with in-batch negatives, the passages of all other rows.

L = -log e^{s+/t} / (e^{s+/t} + sum_j e^{s_j/t}), s the cosine (van den Oord et al. 2018; BGE, E5, piccolo stage 1). A
passage equal to one of the query's positives is no negative. With a `margin`, a passage with cos > cos(positive) + margin
is none either (0.1 in Qwen3-Embedding; a negative margin keeps only negatives that far below the positive).
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor


@dataclass(frozen=True)
class InfoNCE:
    temperature: float = 0.02
    margin: float | None = None
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        return self.weight * batch.keys.global_mean(cross_entropies(batch, self.temperature, self.margin))


def cross_entropies(batch: Batch, temperature: float, margin: float | None = None, hardness: float = 0.0) -> Tensor:
    """-log softmax probability of each local row's positive, [b]. hardness: times a negative's cosine, added to its logit."""
    from torch.nn import functional

    scale, positive = batch.scale(temperature), batch.positive_cosines()
    return functional.softplus(negatives(batch, scale, positive, margin, hardness) - scale * positive)


def negatives(
    batch: Batch, scale: Tensor, positive: Tensor, margin: float | None = None, hardness: float = 0.0
) -> Tensor:
    """log of the sum of e^{scale s + hardness s} over each local row's negatives, [b]. positive: cosines of the positives."""
    from .tiled_logsumexp import ExcludedPairs, log_partition

    keys = batch.keys
    ceiling = None if margin is None else positive.detach() + margin
    positive_keys = keys.positive_keys[keys.local]
    if keys.in_batch:
        queries, passages = batch.unit_queries(), batch.all_unit_passages().flatten(0, 1)
        excluded_pairs = ExcludedPairs(positive_keys, keys.passage_keys.flatten(), ceiling)
        return log_partition(queries, passages, scale, excluded_pairs, hardness)
    cosines = batch.own_cosines()
    excluded = (keys.passage_keys[keys.local].unsqueeze(-1) == positive_keys.unsqueeze(1)).any(-1)
    if ceiling is not None:
        excluded |= cosines.detach() > ceiling.unsqueeze(1)
    return _masked_logsumexp(scale * cosines + hardness * cosines.detach(), excluded)


def _masked_logsumexp(logits: Tensor, excluded: Tensor) -> Tensor:
    """logsumexp of each row without the excluded logits, [n]; -inf with zero gradient, not NaN, where all are excluded."""
    empty = excluded.all(1)
    kept = logits.masked_fill(excluded, float("-inf")).masked_fill(empty.unsqueeze(1), 0.0)
    return kept.logsumexp(1).masked_fill(empty, float("-inf"))


LOSS = InfoNCE

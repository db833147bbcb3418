"""GTE's contrastive loss: one softmax over all four directions between queries and passages.

L = -log e^{s(q_i,d_i)/t} / Z_i, Z_i = sum_j e^{s(q_i,p_j)/t} + sum_{j!=i} e^{s(q_i,q_j)/t} + sum_j e^{s(q_j,d_i)/t} +
sum_j e^{s(p_j,d_i)/t}, p all passages with the hard negatives, d_i the positive of row i (Li et al. 2023, arXiv 2308.03281;
piccolo stage 2). As in sentence-transformers, e^{s(q_i,d_i)/t} is in Z twice and the last sum has no passage of row i.
Our choice: a text that shares a known positive or the query's text with row i is no negative, in any direction. For a dataset
without in-batch negatives Z is only the first sum, over the row's own passages.
"""

from dataclasses import dataclass
from typing import ClassVar

from . import EMBEDDING, Batch, Tensor
from .infonce import negatives


@dataclass(frozen=True)
class GTE:
    temperature: float = 0.01
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        import torch

        scale = batch.scale(self.temperature)
        positive = batch.positive_cosines()
        terms = [scale * positive, negatives(batch, scale, positive)]
        if batch.keys.in_batch:
            terms += [*_other_directions(batch, scale), scale * positive]
        partition = torch.stack(terms).logsumexp(0)
        return self.weight * batch.keys.global_mean(partition - scale * positive)


def _other_directions(batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log partition functions of each local row, [b]: query over queries, positive over queries, positive over passages."""
    import torch

    from .tiled_logsumexp import ExcludedPairs, log_partition

    keys = batch.keys
    own = torch.cat([keys.query_keys.unsqueeze(1), keys.positive_keys], dim=1)[keys.local]
    queries, passages = batch.all_unit_queries(), batch.all_unit_passages()
    positives = batch.unit(batch.passages[:, 0])
    query_of_passage = keys.query_keys.unsqueeze(1).expand_as(keys.passage_keys)
    excluded_queries = ExcludedPairs(own, torch.stack([keys.query_keys, keys.passage_keys[:, 0]], dim=1))
    excluded_passages = ExcludedPairs(own, torch.stack([query_of_passage, keys.passage_keys], dim=2).flatten(0, 1))
    return (
        log_partition(batch.unit_queries(), queries, scale, excluded_queries),
        log_partition(positives, queries, scale, excluded_queries),
        log_partition(positives, passages.flatten(0, 1), scale, excluded_passages),
    )


LOSS = GTE

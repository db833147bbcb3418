"""GTE's contrastive loss: queries and positives are told from each other in all four directions, in one softmax.

L = -log e^{s(q_i,d_i)/t} / Z_i, Z_i = sum_j e^{s(q_i,p_j)/t} + sum_{j!=i} e^{s(q_i,q_j)/t} + sum_j e^{s(q_j,d_i)/t} +
sum_j e^{s(p_j,d_i)/t}, p all passages with the hard negatives, d_i the positive of row i (Li et al. 2023, arXiv 2308.03281;
piccolo stage 2). As in sentence-transformers, e^{s(q_i,d_i)/t} stands in Z twice and the last sum has no passage of row i.
Our choice: what shares a known positive or the text of the query with row i is no negative, in any direction. A dataset
without in-batch negatives has the first sum alone, over the row's own passages.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch
from .infonce import negatives

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GTE:
    temperature: float = 0.01
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        import torch

        scale = batch.scale(self.temperature)
        positive = (batch.unit_queries() * batch.unit(batch.passages[:, 0])).sum(-1)
        terms = [scale * positive, negatives(batch, scale, positive)]
        if batch.rows.in_batch:
            terms += [*_other_directions(batch, scale), scale * positive]
        partition = torch.stack(terms).logsumexp(0)
        return self.weight * batch.rows.mean(partition - scale * positive)


def _other_directions(batch: Batch, scale: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """Log partitions of each local row, [b]: its query over queries, its positive over queries, and over passages."""
    import torch

    from .tiled_logsumexp import Excluded, log_partition

    rows = batch.rows
    own = torch.cat([rows.query_keys.unsqueeze(1), rows.positive_keys], dim=1)[rows.here]
    queries, passages = batch.all_unit_queries(), batch.all_unit_passages()
    positives = batch.unit(batch.passages[:, 0])
    asked = rows.query_keys.unsqueeze(1).expand_as(rows.passage_keys)
    of_queries = Excluded(own, torch.stack([rows.query_keys, rows.passage_keys[:, 0]], dim=1))
    of_passages = Excluded(own, torch.stack([asked, rows.passage_keys], dim=2).flatten(0, 1))
    return (
        log_partition(batch.unit_queries(), queries, scale, of_queries),
        log_partition(positives, queries, scale, of_queries),
        log_partition(positives, passages.flatten(0, 1), scale, of_passages),
    )


LOSS = GTE

"""InfoNCE: the positive against hard negatives and, of a dataset that allows it, the passages of all other rows.

L = -log e^{s+/t} / (e^{s+/t} + sum_j e^{s_j/t}), s the cosine (van den Oord et al. 2018; BGE, E5, piccolo stage 1). A
passage equal to one of the query's positives is no negative; with a `margin`, neither is one whose cosine is above
the positive's by more than that (0.1 in Qwen3-Embedding; below 0 it asks for distance).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from . import EMBEDDING, Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InfoNCE:
    temperature: float = 0.02
    margin: float | None = None
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        return self.weight * batch.rows.mean(cross_entropies(batch, self.temperature, self.margin))


def cross_entropies(batch: Batch, temperature: float, margin: float | None = None, hardness: float = 0.0) -> "Tensor":
    """-log softmax of each local row's positive, [b]. hardness: added to each negative's logit, times its cosine."""
    from torch.nn import functional

    queries, scale = batch.unit_queries(), batch.scale(temperature)
    positive = (queries * batch.unit(batch.passages[:, 0])).sum(-1)
    return functional.softplus(negatives(batch, scale, positive, margin, hardness) - scale * positive)


def negatives(
    batch: Batch, scale: "Tensor", positive: "Tensor", margin: float | None = None, hardness: float = 0.0
) -> "Tensor":
    """log sum over each local row's negatives of e^{scale s + hardness s}, [b]. positive: cosines of the positives."""
    from .tiled_logsumexp import Excluded, log_partition

    rows, queries = batch.rows, batch.unit_queries()
    ceiling = None if margin is None else positive.detach() + margin
    known = rows.positive_keys[rows.here]
    if rows.in_batch:
        passages = batch.all_unit_passages().flatten(0, 1)
        return log_partition(queries, passages, scale, Excluded(known, rows.passage_keys.flatten(), ceiling), hardness)
    cosines = (batch.unit_passages() @ queries.unsqueeze(-1)).squeeze(-1)
    out = (rows.passage_keys[rows.here].unsqueeze(-1) == known.unsqueeze(1)).any(-1)
    if ceiling is not None:
        out |= cosines.detach() > ceiling.unsqueeze(1)
    return _log_sum_exp(scale * cosines + hardness * cosines.detach(), out)


def _log_sum_exp(logits: "Tensor", out: "Tensor") -> "Tensor":
    """Over what is not out, [n]; -inf without gradient, not NaN, where all is out."""
    empty = out.all(1)
    kept = logits.masked_fill(out, float("-inf")).masked_fill(empty.unsqueeze(1), 0.0)
    return kept.logsumexp(1).masked_fill(empty, float("-inf"))


LOSS = InfoNCE

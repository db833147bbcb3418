"""BGE-M3's unified loss: dense, lexical and multi-vector scores and their sum, which also teaches the three.

s_d: cosine. s_s: dot of the texts' words, a word weighing what the heaviest of its tokens does. s_c: mean over a query's tokens
of the greatest cosine to a token of the passage, both without the first token. All over the temperature;
s_e = s_d + 0.3 s_s + s_c. With L_x = -log softmax(s_x)+ and D_x = -sum softmax(s_e) log softmax(s_x), softmax(s_e) without gradient,
    L = (1 - share) (L_d + L_e + 0.1 L_s + L_c) / 4 + share (D_d + 0.1 D_s + D_c) / 3
(Chen et al. 2024, arXiv 2402.03216; FlagEmbedding's unified finetuning, temperature 0.02, share 1/2). Columns are the passages
of a row's own slice of the batch, as published, where a slice is what a device has. A positive's duplicate is no negative. Padding,
which with them can be a passage's nearest token, does not exist here.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from . import EMBEDDING, Batch, TokenOutputs, TokenTexts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class M3Unified:
    temperature: float = 0.02
    share: float = 0.5
    weight: float = 1.0
    of: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> "Tensor":
        if batch.tokens is None:
            raise InputError(
                "m3-unified needs lexical weights and vectors of tokens: take a BGE-M3 model, which gives them"
            )
        scale, out = batch.scale(self.temperature), _excluded(batch)
        dense = scale * batch.unit_queries() @ batch.unit_passages().flatten(0, 1).T
        lexical, multiple = scale * _lexical(batch.tokens), scale * _multiple(batch)
        both = dense + 0.3 * lexical + multiple
        logs = [each.masked_fill(out, float("-inf")).log_softmax(1) for each in (dense, both, lexical, multiple)]
        own = _own_positive(batch)
        hard = [-log[own] for log in logs]
        taught = logs[1].detach().exp()
        soft = [-(taught * log.masked_fill(out, 0.0)).sum(1) for log in logs]
        values = (1 - self.share) * (hard[0] + hard[1] + 0.1 * hard[2] + hard[3]) / 4
        values = values + self.share * (soft[0] + 0.1 * soft[2] + soft[3]) / 3
        return self.weight * batch.rows.mean(values)


def _own_positive(batch: Batch) -> tuple["Tensor", "Tensor"]:
    """Where each local row's positive stands among the rank's passages, to index [b, b * g]."""
    import torch

    count, group = batch.rows.count, batch.passages.shape[1]
    numbers = torch.arange(count, device=batch.queries.device)
    return numbers, numbers * group


def _excluded(batch: Batch) -> "Tensor":
    """bool [b, b * g], True for passages that are no candidates: other positives of the row, those of other slices and, in a
    dataset without in-batch negatives, those of other rows."""
    import torch

    rows, group = batch.rows, batch.passages.shape[1]
    keys = rows.passage_keys[rows.here].flatten()
    out = torch.zeros(rows.count, len(keys), dtype=torch.bool, device=keys.device)
    for key in rows.positive_keys[rows.here].unbind(1):
        out |= key[:, None] == keys[None, :]
    if not rows.in_batch:
        numbers = torch.arange(rows.count, device=keys.device)
        out |= numbers[:, None] != numbers.repeat_interleave(group)[None, :]
    if rows.slice_rows:
        slices = torch.arange(rows.count, device=keys.device) // rows.slice_rows
        out |= slices[:, None] != slices.repeat_interleave(group)[None, :]
    out[_own_positive(batch)] = False
    return out


def _lexical(tokens: TokenOutputs) -> "Tensor":
    """Dots of words, [b, b * g]: over the words of the queries, as no other counts."""
    import torch

    ids = tokens.queries.ids
    words = ids[~torch.isin(ids, ids.new_tensor(tokens.special))].unique()
    return _words(tokens.queries, words) @ _words(tokens.passages, words).T


def _words(texts: TokenTexts, words: "Tensor") -> "Tensor":
    """The weight of each of the ascending words in each text, [n, words]."""
    import torch

    weights = texts.weights.to(torch.promote_types(texts.weights.dtype, torch.float32))
    found = torch.isin(texts.ids, words)
    places = texts.owners()[found] * len(words) + torch.searchsorted(words, texts.ids[found])
    empty = weights.new_zeros((len(texts.offsets) - 1) * len(words))
    return empty.scatter_reduce(0, places, weights[found], "amax").view(-1, len(words))


def _multiple(batch: Batch) -> "Tensor":
    """Late interaction, [b, b * g], passage by passage."""
    import torch

    assert batch.tokens is not None
    queries, passages = batch.tokens.queries, batch.tokens.passages
    vectors = torch.nn.functional.normalize(_float(queries.vectors), dim=-1)
    others = torch.nn.functional.normalize(_float(passages.vectors), dim=-1)
    kept = torch.ones_like(queries.ids, dtype=torch.bool)
    kept[queries.offsets[:-1]] = False
    vectors, owners = vectors[kept], queries.owners()[kept]
    pieces = others.split(passages.offsets.diff().tolist())  # of a slice each the gradient would be of all tokens
    nearest = [(vectors @ piece[1:].T).max(1).values for piece in pieces]  # keeps places, not products
    sums = vectors.new_zeros(len(queries.offsets) - 1, len(nearest)).index_add(0, owners, torch.stack(nearest, dim=1))
    return sums / owners.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)


def _float(vectors: "Tensor") -> "Tensor":
    """In float32 or better."""
    import torch

    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


LOSS = M3Unified

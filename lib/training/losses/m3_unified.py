"""BGE-M3's unified loss: dense, lexical and multi-vector scores and their sum, which is the teacher of all three.

s_d: cosine. s_s: dot product of word weights, where a word's weight is the largest of its tokens' weights. s_c: mean over a
query's tokens of the largest cosine to a token of the passage, both without their first token. All over the temperature;
s_e = s_d + 0.3 s_s + s_c. With L_x = -log softmax(s_x)+ and D_x = -sum softmax(s_e) log softmax(s_x), softmax(s_e) without gradient,
    L = (1 - share) (L_d + L_e + 0.1 L_s + L_c) / 4 + share (D_d + 0.1 D_s + D_c) / 3
(Chen et al. 2024, arXiv 2402.03216; FlagEmbedding's unified finetuning, temperature 0.02, share 1/2). The softmax is over the
passages of a row's own virtual rank; in the published code, of its device. A duplicate of the positive is no negative. Their
padding tokens can be a passage's nearest token; here there is no padding.
"""

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError
from . import EMBEDDING, Batch, Tensor, TokenOutputs, TokenTexts, at_least_float32


@dataclass(frozen=True)
class M3Unified:
    temperature: float = 0.02
    share: float = 0.5
    weight: float = 1.0
    kind: ClassVar[str] = EMBEDDING

    def __call__(self, batch: Batch) -> Tensor:
        if batch.tokens is None:
            raise InputError(
                "m3-unified needs lexical weights and vectors of tokens: take a BGE-M3 model, which gives them"
            )
        scale, excluded = batch.scale(self.temperature), _excluded(batch)
        dense = scale * batch.unit_queries() @ batch.unit_passages().flatten(0, 1).T
        lexical, multi_vector = scale * _lexical_scores(batch.tokens), scale * _multi_vector_scores(batch)
        ensemble = dense + 0.3 * lexical + multi_vector
        all_scores = (dense, ensemble, lexical, multi_vector)
        logs = [scores.masked_fill(excluded, float("-inf")).log_softmax(1) for scores in all_scores]
        own = _own_positive(batch)
        hard = [-log[own] for log in logs]
        teacher = logs[1].detach().exp()
        soft = [-(teacher * log.masked_fill(excluded, 0.0)).sum(1) for log in logs]
        values = (1 - self.share) * (hard[0] + hard[1] + 0.1 * hard[2] + hard[3]) / 4
        values = values + self.share * (soft[0] + 0.1 * soft[2] + soft[3]) / 3
        return self.weight * batch.keys.global_mean(values)


def _own_positive(batch: Batch) -> tuple[Tensor, Tensor]:
    """Indices into [b, b * g] of each local row's positive."""
    import torch

    count, group = batch.keys.count, batch.passages.shape[1]
    numbers = torch.arange(count, device=batch.queries.device)
    return numbers, numbers * group


def _excluded(batch: Batch) -> Tensor:
    """Passages that are neither the row's positive nor a negative of it, bool [b, b * g].

    They are the row's other positives, the passages of other virtual ranks and, without in-batch negatives, of other rows.
    """
    import torch

    keys, group = batch.keys, batch.passages.shape[1]
    passages = keys.passage_keys[keys.local].flatten()
    excluded = torch.zeros(keys.count, len(passages), dtype=torch.bool, device=passages.device)
    for key in keys.positive_keys[keys.local].unbind(1):
        excluded |= key[:, None] == passages[None, :]
    if not keys.in_batch:
        numbers = torch.arange(keys.count, device=passages.device)
        excluded |= numbers[:, None] != numbers.repeat_interleave(group)[None, :]
    if keys.virtual_rank_rows:
        ranks = torch.arange(keys.count, device=passages.device) // keys.virtual_rank_rows
        excluded |= ranks[:, None] != ranks.repeat_interleave(group)[None, :]
    excluded[_own_positive(batch)] = False
    return excluded


def _lexical_scores(tokens: TokenOutputs) -> Tensor:
    """Dot products of word weights, [b, b * g]. Only words of the queries can contribute."""
    import torch

    ids = tokens.queries.ids
    words = ids[~torch.isin(ids, ids.new_tensor(tokens.special))].unique()
    return _word_weights(tokens.queries, words) @ _word_weights(tokens.passages, words).T


def _word_weights(texts: TokenTexts, words: Tensor) -> Tensor:
    """The weight of each word in each text, [n, words]. words: ascending token ids."""
    import torch

    weights = at_least_float32(texts.weights)
    known = torch.isin(texts.ids, words)
    cells = texts.text_numbers()[known] * len(words) + torch.searchsorted(words, texts.ids[known])
    empty = weights.new_zeros((len(texts.offsets) - 1) * len(words))
    return empty.scatter_reduce(0, cells, weights[known], "amax").view(-1, len(words))


def _multi_vector_scores(batch: Batch) -> Tensor:
    """Late interaction scores, [b, b * g], computed one passage at a time."""
    import torch

    assert batch.tokens is not None
    queries, passages = batch.tokens.queries, batch.tokens.passages
    query_vectors = torch.nn.functional.normalize(at_least_float32(queries.vectors), dim=-1)
    passage_vectors = torch.nn.functional.normalize(at_least_float32(passages.vectors), dim=-1)
    not_first = torch.ones_like(queries.ids, dtype=torch.bool)
    not_first[queries.offsets[:-1]] = False
    query_vectors, query_numbers = query_vectors[not_first], queries.text_numbers()[not_first]
    # One split: a slice for each passage would each allocate a gradient of all tokens.
    by_passage = passage_vectors.split(passages.offsets.diff().tolist())
    nearest = [(query_vectors @ vectors[1:].T).max(1).values for vectors in by_passage]  # autograd keeps indices only
    sums = query_vectors.new_zeros(len(queries.offsets) - 1, len(nearest))
    sums = sums.index_add(0, query_numbers, torch.stack(nearest, dim=1))
    return sums / query_numbers.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)


LOSS = M3Unified

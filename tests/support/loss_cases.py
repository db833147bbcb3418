"""Random global batches for tests of losses, and comparison of values and gradients."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lib.training.losses import EMBEDDING, Batch, BatchKeys, Scores, TokenOutputs, TokenTexts, parse

ROWS, GROUP, DIM = 8, 3, 6
WORDS = 8  # size of the vocabulary of token texts
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32


@dataclass
class Case:
    """A global batch. leaves: the tensors whose gradients are compared."""

    keys: BatchKeys
    queries: Tensor
    passages: Tensor
    scores: Tensor
    logit_scale: Tensor
    tokens: TokenOutputs

    @property
    def leaves(self) -> list[Tensor]:
        texts = (self.tokens.queries, self.tokens.passages)
        of_tokens = [tensor for text in texts for tensor in (text.weights, text.vectors)]
        return [self.queries, self.passages, self.scores, self.logit_scale, *of_tokens]

    def batch(self, loss, rank: int = 0, world: int = 1, gather=lambda local: local):
        """The input of the loss on one rank."""
        count = ROWS // world
        keys = replace(self.keys, first=rank * count, count=count, world=world)
        if loss.kind != EMBEDDING:
            return Scores(keys, self.scores[keys.local])
        queries, passages = self.queries[keys.local], self.passages[keys.local]
        return Batch(keys, queries, passages, gather, self.logit_scale, tokens=self.tokens if world == 1 else None)


def random_case(
    in_batch: bool = True, duplicates: bool = True, dtype=torch.float64, spread: float = 0.3, seed: int = 0
) -> Case:
    """Draw a random global batch.

    duplicates: include two rows with the same query, two with the same positive, and hard negatives that are a positive of
    another row, a positive of their own row, or a hard negative of another row.
    """
    random = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=random, dtype=dtype)
    query_keys = torch.arange(100, 100 + ROWS)
    passage_keys = torch.arange(1000, 1000 + ROWS * GROUP).view(ROWS, GROUP)
    positive_keys = passage_keys[:, :1].repeat(1, 2)
    middle = draw(DIM)
    queries, passages = middle + spread * draw(ROWS, DIM), middle + spread * draw(ROWS, GROUP, DIM)
    if duplicates:
        query_keys[4], queries[4] = query_keys[1], queries[1]
        positive_keys[1, 1], positive_keys[4, 1] = passage_keys[4, 0], passage_keys[1, 0]
        for copy, source in (((5, 0), (3, 0)), ((2, 1), (0, 0)), ((6, 2), (6, 0)), ((7, 1), (3, 2))):
            passage_keys[copy], passages[copy] = passage_keys[source], passages[source]
        positive_keys[5] = passage_keys[5, 0]
    teacher = torch.randint(0, 4, (ROWS, GROUP), generator=random) / 4
    teacher[:, 0] = torch.tensor([0.25, 1.0, 0.5, 0.5, 0.0, 1.0, 0.75, 0.25])
    keys = BatchKeys(query_keys, passage_keys, positive_keys, teacher, in_batch, 0, ROWS, 1)
    tokens = TokenOutputs(random_texts(random, dtype, ROWS), random_texts(random, dtype, ROWS * GROUP), (0, 2))
    case = Case(keys, queries, passages, draw(ROWS, GROUP), torch.tensor(-0.5, dtype=dtype), tokens)
    for leaf in case.leaves:
        leaf.requires_grad_()
    return case


def random_texts(random: torch.Generator, dtype: torch.dtype, count: int) -> TokenTexts:
    """Draw texts of 2 to 6 tokens from so few words that a text has some twice."""
    lengths = torch.randint(2, 7, (count,), generator=random)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(offsets[-1])
    ids = torch.randint(0, WORDS, (total,), generator=random)
    weights = torch.rand(total, generator=random, dtype=dtype) * 0.2
    return TokenTexts(ids, offsets, weights, torch.randn(total, 5, generator=random, dtype=dtype))


def loss_of(name: str):
    return parse((name,))


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    computed = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(computed, leaves, strict=True)]


def assert_same(actual: Tensor, expected: Tensor, leaves: list[Tensor], **tolerance) -> None:
    """Compare two values and their gradients with respect to all leaves."""
    torch.testing.assert_close(actual, expected, **tolerance)
    for one, other in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)

"""Gradients of one step: those of one large batch, at any number of ranks and any chunk size.

GradCacheStep is for losses between rows. First pass: embed every chunk without gradients. Then the loss of all embeddings
gives the gradient of each. Second pass: embed every chunk again, with the same dropout, and backpropagate these gradients
into the weights. AccumulatingStep is for losses inside single rows: one pass, gradients accumulate over chunks.

Dropout seeds depend on step, virtual rank and chunk alone, so no random state is stored for the second pass or a restart.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.forward import move
from ...models.spec import Tokens
from ..losses import Batch, BatchKeys, Scores
from .chunks import Chunker, ChunkPlan
from .collectives import Rank
from .parallel import SingleProcess
from .trainable import Inputs

Autocast = Callable[[], AbstractContextManager]
SEEDS = 2**62  # seeds are below this: torch and numpy take them as int64


def seed_of(*parts: int) -> int:
    """Hash integers to a seed, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % SEEDS


def seed_dropout(seed: int) -> None:
    """Seed torch's generators, from which the next forward pass draws its dropout."""
    torch.manual_seed(seed)


@dataclass(frozen=True)
class StepInputs:
    """A rank's share of a global batch.

    inputs: queries [b], then passages [b * g], row by row; for losses inside rows only the pairs or texts. seed: of the step.
    """

    keys: BatchKeys
    rank: Rank
    inputs: Inputs
    seed: int

    @property
    def tokens(self) -> Tokens:
        return self.inputs.tokens

    def rows_by_virtual_rank(self) -> list[np.ndarray]:
        """Numbers of the rank's rows, one int64 array a virtual rank."""
        length = self.rank.virtual_rank_rows
        return [np.arange(i * length, (i + 1) * length) for i in range(len(self.rank.own_virtual_ranks()))]

    def texts_by_virtual_rank(self) -> list[np.ndarray]:
        """Numbers of the rank's texts, queries and then passages, one int64 array a virtual rank."""
        count, texts = self.keys.count, []
        group = (len(self.tokens.offsets) - 1 - count) // count
        for rows in self.rows_by_virtual_rank():
            passages = count + rows[:, None] * group + np.arange(group)
            texts.append(np.concatenate([rows, passages.reshape(-1)]))
        return texts

    def chunk_seed(self, position: int, chunk: int) -> int:
        """Dropout seed of a chunk. position: of its virtual rank among the rank's own."""
        return seed_of(self.seed, self.rank.own_virtual_ranks()[position], chunk)


@dataclass(frozen=True)
class GradCacheStep:
    """Two passes (GradCache), for losses between rows.

    network: gives one output a text [n, ...], then perhaps outputs a token [t, ...]. logit_scale: see losses.Batch.
    assemble: makes losses.TokenOutputs from the token outputs, for losses that use them.
    """

    network: SingleProcess
    loss: Callable[[Batch], Tensor]
    chunker: Chunker
    autocast: Autocast = nullcontext
    logit_scale: Tensor | None = None
    assemble: Callable[[StepInputs, tuple[Tensor, ...]], Any] | None = None

    def __call__(self, batch: StepInputs) -> Tensor:
        """Leave the gradients of a batch in the weights, averaged over the ranks, and return the rank's loss, []."""
        plans = self.chunker.plan(batch.inputs, batch.texts_by_virtual_rank(), 1, batch.chunk_seed)
        leaves = self._embed_no_grad(batch, plans)
        value = self._loss_gradients(batch, leaves)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        self._backpropagate(batch, plans, gradients)
        return value

    def _embed_no_grad(self, batch: StepInputs, plans: list[ChunkPlan]) -> tuple[Tensor, ...]:
        """Outputs of all texts in their order, as leaves of the loss's graph.

        Outputs are copied into one tensor at once: small tensors kept between the large ones of a forward pass fragment memory.
        """
        leaves: tuple[Tensor, ...] = ()
        for number in range(self.network.forward_count(len(plans))):
            plan = plans[min(number, len(plans) - 1)]
            packed, tokens = self.chunker.pack(batch.inputs, plan)
            seed_dropout(plan.seed)
            with self.autocast():
                outputs = self.network.forward_no_grad(packed)
            leaves = leaves or _empty_outputs(outputs, batch.tokens)
            for leaf, output, positions in zip(leaves, outputs, _positions(plan, tokens, outputs), strict=True):
                leaf.index_copy_(0, positions, output)
        return tuple(leaf.requires_grad_() for leaf in leaves)

    def _loss_gradients(self, batch: StepInputs, leaves: tuple[Tensor, ...]) -> Tensor:
        """Compute the loss and leave its gradients in the leaves. The loss's graph is freed on return."""
        count = batch.keys.count
        # One split: two slices would each allocate a gradient of the whole tensor.
        queries, passages = leaves[0].split([count, len(leaves[0]) - count])
        value = self.loss(
            Batch(
                keys=batch.keys,
                queries=queries,
                passages=passages.unflatten(0, (count, -1)),
                gather=batch.rank.gather,
                logit_scale=self.logit_scale,
                tokens=self.assemble(batch, leaves[1:]) if self.assemble else None,
            )
        )
        value.backward()
        return value.detach()

    def _backpropagate(self, batch: StepInputs, plans: list[ChunkPlan], gradients: list[Tensor]) -> None:
        """Second pass: from the outputs' gradients to those of the weights. The last chunk reduces them over the ranks.

        The surrogate sum(output * gradient) has the gradient of the loss with respect to the weights.
        """
        total = self.network.forward_count(len(plans))
        for number in range(total):
            plan = plans[min(number, len(plans) - 1)]
            packed, tokens = self.chunker.pack(batch.inputs, plan)
            seed_dropout(plan.seed)
            with self.network.gradient_sync(number == total - 1):
                with self.autocast():
                    outputs = self.network(packed)
                triples = zip(outputs, gradients, _positions(plan, tokens, outputs), strict=True)
                surrogate = torch.stack([(out * gradient[where]).sum() for out, gradient, where in triples]).sum()
                (surrogate if number < len(plans) else surrogate * 0.0).backward()


@dataclass(frozen=True)
class AccumulatingStep:
    """One pass with gradient accumulation, for losses inside rows.

    network: gives one score a pair, or one loss a text, [n], as its only output.
    """

    network: SingleProcess
    loss: Callable[[Scores], Tensor]
    chunker: Chunker
    autocast: Autocast = nullcontext

    def __call__(self, batch: StepInputs) -> Tensor:
        group = (len(batch.tokens.offsets) - 1) // batch.keys.count
        plans = self.chunker.plan(batch.inputs, batch.rows_by_virtual_rank(), group, batch.chunk_seed)
        total = self.network.forward_count(len(plans))
        values: list[Tensor] = []
        for number in range(total):
            plan = plans[min(number, len(plans) - 1)]
            packed, _ = self.chunker.pack(batch.inputs, plan)
            seed_dropout(plan.seed)
            with self.network.gradient_sync(number == total - 1):
                with self.autocast():
                    (outputs,) = self.network(packed)
                ascending = np.argsort(plan.documents)  # by number of text: the order of np.sort(plan.rows)
                scores = outputs[move(ascending, outputs.device)].unflatten(0, (len(plan.rows), group))
                part = self.loss(Scores(_keys_of_rows(batch.keys, np.sort(plan.rows)), scores))
                (part if number < len(plans) else part * 0.0).backward()
            values.append(part.detach())
        return sum(values[1 : len(plans)], values[0])


def _empty_outputs(outputs: tuple[Tensor, ...], tokens: Tokens) -> tuple[Tensor, ...]:
    """Allocate the outputs of all texts, then of all tokens, with the shapes and dtypes of one chunk's outputs."""
    counts = [len(tokens.offsets) - 1] + [len(tokens.ids)] * (len(outputs) - 1)
    return tuple(output.new_empty(count, *output.shape[1:]) for output, count in zip(outputs, counts, strict=True))


def _positions(plan: ChunkPlan, tokens: np.ndarray, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """For each output of a chunk, the positions of its rows among those of all chunks, int64."""
    return [move(positions, outputs[0].device) for positions in (plan.documents, *[tokens] * (len(outputs) - 1))]


def _keys_of_rows(keys: BatchKeys, rows: np.ndarray) -> BatchKeys:
    """The same global batch, reordered so that the local rows `rows` come first and are the only local ones."""
    own = keys.first + rows
    others = np.setdiff1d(np.arange(len(keys.query_keys)), own)
    order = move(np.concatenate([own, others]), keys.query_keys.device)
    return replace(
        keys,
        query_keys=keys.query_keys[order],
        passage_keys=keys.passage_keys[order],
        positive_keys=keys.positive_keys[order],
        teacher=None if keys.teacher is None else keys.teacher[order],
        first=0,
        count=len(rows),
    )

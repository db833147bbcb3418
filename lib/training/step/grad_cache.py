"""One step's gradients: of one big batch, at any number of ranks and any size of chunks.

TwoPass (GradCache, Gao et al. 2021) for losses between texts: every chunk runs once without gradients, the loss gives
the gradient of each output, and every chunk runs again, with the same dropout, to carry it into the weights.
OnePass for losses within rows: every chunk runs once. Dropout is drawn from a seed of step, slice and chunk, so nothing
needs to be kept to draw it again, neither for the second pass nor for a restart.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...models.spec import Tokens
from ..losses import Batch, BatchKeys, Scores
from .chunks import Chunk, Chunker, ChunkPlan, index
from .collectives import Rank
from .parallel import SingleProcess
from .trainable import Inputs

Autocast = Callable[[], AbstractContextManager]
CHUNK_SEEDS = 2**62


def seed_of(*parts: int) -> int:
    """A seed that depends on all parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % CHUNK_SEEDS


def seed_dropout(seed: int) -> None:
    """Dropout from here on is drawn from this seed."""
    torch.manual_seed(seed)


@dataclass(frozen=True)
class StepInputs:
    """A rank's part of a global batch. inputs: queries [b] and then passages [b * g], row by row; pairs or texts where the
    loss is within rows. seed: of the step."""

    rows: BatchKeys
    place: Rank
    inputs: Inputs
    seed: int

    @property
    def tokens(self) -> Tokens:
        return self.inputs.tokens

    def slices(self) -> list[np.ndarray]:
        """The rank's own rows, a slice after the other: int64 each."""
        length = self.place.length
        return [np.arange(i * length, (i + 1) * length) for i in range(len(self.place.own_slices()))]

    def chunk_seed(self, slice_number: int, chunk: int) -> int:
        return seed_of(self.seed, self.place.own_slices()[slice_number], chunk)


class Step(Protocol):
    """Gradients of a rank's work are left in the weights, reduced over the ranks; returns the rank's loss, []."""

    def __call__(self, work: StepInputs) -> Tensor: ...


@dataclass(frozen=True)
class GradCacheStep:
    """network: outputs of each text [n, ...] first, then perhaps of each token. sharpness: see Batch. assemble: what the
    loss sees of token outputs, made of queries and passages."""

    network: SingleProcess
    loss: Callable[[Batch], Tensor]
    cutter: Chunker
    autocast: Autocast = nullcontext
    sharpness: Tensor | None = None
    assemble: Callable[[StepInputs, tuple[Tensor, ...]], Any] | None = None

    def __call__(self, work: StepInputs) -> Tensor:
        cuts = self.cutter.by_text(work.inputs, _texts(work), work.chunk_seed)
        leaves = self._outputs(work, cuts)
        value = self._value(work, leaves)
        self._carry(work, cuts, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
        return value

    def _value(self, work: StepInputs, leaves: tuple[Tensor, ...]) -> Tensor:
        """The loss, with the outputs' gradients left in them; of its graph nothing stays."""
        count = work.rows.count
        # one split: two slices would each make a gradient of all
        queries, passages = leaves[0].split([count, len(leaves[0]) - count])
        batch = Batch(
            rows=work.rows,
            queries=queries,
            passages=passages.unflatten(0, (count, -1)),
            gather=work.place.gather,
            sharpness=self.sharpness,
            tokens=self.assemble(work, leaves[1:]) if self.assemble else None,
        )
        value = self.loss(batch)
        value.backward()
        return value.detach()

    def _outputs(self, work: StepInputs, cuts: list[ChunkPlan]) -> tuple[Tensor, ...]:
        """Outputs of all texts in their order, as leaves of the loss's graph. Each is copied to its place at once: small
        tensors kept from among the great ones of a forward leave holes in the heap."""
        leaves: tuple[Tensor, ...] = ()
        for number in range(self.network.chunks(len(cuts))):
            chunk = self.cutter.chunk(work.inputs, cuts[min(number, len(cuts) - 1)])
            seed_dropout(chunk.seed)
            with self.autocast():
                outputs = self.network.peek(chunk.flat)
            leaves = leaves or _room(outputs, work.tokens)
            for leaf, output, place in zip(leaves, outputs, _places(chunk, outputs), strict=True):
                leaf.index_copy_(0, place, output)
        return tuple(leaf.requires_grad_() for leaf in leaves)

    def _carry(self, work: StepInputs, cuts: list[ChunkPlan], gradients: list[Tensor]) -> None:
        """The gradients of the outputs into the weights, reduced over the ranks in the last chunk."""
        total = self.network.chunks(len(cuts))
        for number in range(total):
            chunk = self.cutter.chunk(work.inputs, cuts[min(number, len(cuts) - 1)])
            seed_dropout(chunk.seed)
            with self.network.syncing(number == total - 1):
                with self.autocast():
                    outputs = self.network(chunk.flat)
                triples = zip(outputs, gradients, _places(chunk, outputs), strict=True)
                surrogate = torch.stack([(out * gradient[place]).sum() for out, gradient, place in triples]).sum()
                (surrogate if number < len(cuts) else surrogate * 0.0).backward()


@dataclass(frozen=True)
class AccumulatingStep:
    """network: one score of each pair, or one loss of each text, [n] as its first output."""

    network: SingleProcess
    loss: Callable[[Scores], Tensor]
    cutter: Chunker
    autocast: Autocast = nullcontext

    def __call__(self, work: StepInputs) -> Tensor:
        group = (len(work.tokens.offsets) - 1) // work.rows.count
        cuts = self.cutter.by_row(work.inputs, work.slices(), group, work.chunk_seed)
        total, value = self.network.chunks(len(cuts)), None
        for number in range(total):
            cut = cuts[min(number, len(cuts) - 1)]
            chunk, taken = self.cutter.chunk(work.inputs, cut), cut.rows
            assert taken is not None
            seed_dropout(chunk.seed)
            with self.network.syncing(number == total - 1):
                with self.autocast():
                    (outputs,) = self.network(chunk.flat)
                back = np.argsort(chunk.documents)  # rows in the order of their numbers, as _of_rows has them
                scores = outputs[index(back, outputs.device)].unflatten(0, (len(taken), group))
                part = self.loss(Scores(_of_rows(work.rows, np.sort(taken)), scores))
                (part if number < len(cuts) else part * 0.0).backward()
            if number < len(cuts):
                value = part.detach() if value is None else value + part.detach()
        assert value is not None
        return value


def _room(outputs: tuple[Tensor, ...], tokens: Tokens) -> tuple[Tensor, ...]:
    """Where the outputs of all chunks go, of the kinds of one chunk's: of all texts first, then of all tokens."""
    counts = [len(tokens.offsets) - 1] + [len(tokens.ids)] * (len(outputs) - 1)
    return tuple(output.new_empty(count, *output.shape[1:]) for output, count in zip(outputs, counts, strict=True))


def _places(chunk: Chunk, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Of each output's rows among those of all chunks."""
    documents, *tokens = chunk.documents, *[chunk.tokens] * (len(outputs) - 1)
    return [index(places, outputs[0].device) for places in (documents, *tokens)]


def _texts(work: StepInputs) -> list[np.ndarray]:
    """Texts of each slice: its queries and its passages."""
    count, found = work.rows.count, []
    group = (len(work.tokens.offsets) - 1 - count) // count
    for rows in work.slices():
        passages = count + rows[:, None] * group + np.arange(group)
        found.append(np.concatenate([rows, passages.reshape(-1)]))
    return found


def _of_rows(rows: BatchKeys, taken: np.ndarray) -> BatchKeys:
    """The same global batch, of which only the local rows `taken` are here: they come first in it, the others after."""
    own = rows.first + taken
    order = index(np.concatenate([own, np.setdiff1d(np.arange(len(rows.query_keys)), own)]), rows.query_keys.device)
    return replace(
        rows,
        query_keys=rows.query_keys[order],
        passage_keys=rows.passage_keys[order],
        positive_keys=rows.positive_keys[order],
        teacher=None if rows.teacher is None else rows.teacher[order],
        first=0,
        count=len(taken),
    )

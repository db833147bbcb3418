"""A rank's texts cut into chunks by token budget, in an order that does not depend on how many ranks there are."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...models.forward import PackedBatch, flatten, move
from ...models.packing import gather, longest_first, next_cut, offsets_of
from .trainable import Inputs


@dataclass(frozen=True)
class ChunkPlan:
    """A chunk to be: its documents (int64 [n], places among the rank's texts, longest first), the seed of their dropout, and,
    where whole rows were asked for, which of the rank's rows they belong to."""

    documents: np.ndarray
    seed: int
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Chunk:
    """A cut's tokens. tokens: int64 [t], places among those of the rank's texts."""

    documents: np.ndarray
    tokens: np.ndarray
    flat: PackedBatch
    seed: int


@dataclass(frozen=True)
class Chunker:
    """How chunks are made: at most `budget` tokens each, on `device`; padding_id as forward.positions wants it.

    A chunk is made when its turn comes, in each pass anew: all at once would be several times the tokens of the batch.
    """

    budget: int
    device: torch.device
    padding_id: int | None

    def by_text(self, inputs: Inputs, slices: list[np.ndarray], seeds: Callable[[int, int], int]) -> list[ChunkPlan]:
        """Cuts of whole texts. slices: the texts of each slice of the rank. seeds: of a slice's place and a chunk's."""
        lengths = np.diff(inputs.tokens.offsets)
        found = []
        for place, documents in enumerate(slices):
            order = documents[longest_first(lengths[documents])]
            found += [
                ChunkPlan(order[start:end], seeds(place, number))
                for number, (start, end) in enumerate(_cuts(lengths[order], self.budget))
            ]
        return found

    def by_row(
        self, inputs: Inputs, slices: list[np.ndarray], group: int, seeds: Callable[[int, int], int]
    ) -> list[ChunkPlan]:
        """Cuts of whole rows of `group` texts each. slices: the rows of each slice."""
        lengths = np.diff(inputs.tokens.offsets)
        sums = lengths.reshape(-1, group).sum(1)
        found = []
        for place, rows in enumerate(slices):
            order = rows[longest_first(sums[rows])]
            for number, (start, end) in enumerate(_cuts(sums[order], self.budget)):
                taken = order[start:end]
                documents = (taken[:, None] * group + np.arange(group)).reshape(-1)
                found.append(ChunkPlan(documents[longest_first(lengths[documents])], seeds(place, number), taken))
        return found

    def chunk(self, inputs: Inputs, cut: ChunkPlan) -> Chunk:
        tokens = inputs.tokens
        places, borders = gather(np.arange(len(tokens.ids)), tokens.offsets, cut.documents)
        flat = flatten(tokens.ids[places], borders, self.padding_id, self.device)
        if inputs.kinds is not None:
            flat = replace(flat, kinds=move(inputs.kinds[places], self.device))
        return Chunk(cut.documents, places, flat, cut.seed)


def index(places: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 on the device."""
    return move(places, device)


def _cuts(lengths: np.ndarray, budget: int) -> list[tuple[int, int]]:
    offsets, start, found = offsets_of(lengths), 0, []
    while start < len(lengths):
        end = next_cut(offsets, start, budget)
        found.append((start, end))
        start = end
    return found

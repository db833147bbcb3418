"""A rank's texts cut into chunks by token budget, in an order that does not depend on how many ranks there are."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..models.forward import Flat, flatten, move
from ..packing import gather, longest_first, next_cut, offsets_of
from .trainee import Inputs


@dataclass(frozen=True)
class Chunk:
    """Documents of a rank's texts, longest first, and the seed of their dropout.

    documents: int64 [n], places among the rank's texts. tokens: int64 [t], places among their tokens. rows: int64, of the
    rank's rows that they belong to, where whole rows were asked for.
    """

    documents: np.ndarray
    tokens: np.ndarray
    flat: Flat
    seed: int


@dataclass(frozen=True)
class Cutter:
    """How chunks are made: at most `budget` tokens each, on `device`; padding_id as forward.positions wants it."""

    budget: int
    device: torch.device
    padding_id: int | None

    def by_text(self, inputs: Inputs, slices: list[np.ndarray], seeds: Callable[[int, int], int]) -> list[Chunk]:
        """Chunks of whole texts. slices: the texts of each slice of the rank. seeds: of a slice's place and a chunk's."""
        lengths = np.diff(inputs.tokens.offsets)
        found = []
        for place, documents in enumerate(slices):
            order = documents[longest_first(lengths[documents])]
            found += [
                self._chunk(inputs, order[start:end], seeds(place, number))
                for number, (start, end) in enumerate(_cuts(lengths[order], self.budget))
            ]
        return found

    def by_row(
        self, inputs: Inputs, slices: list[np.ndarray], group: int, seeds: Callable[[int, int], int]
    ) -> list[tuple[np.ndarray, Chunk]]:
        """Chunks of whole rows of `group` texts each. slices: the rows of each slice. Each chunk with its rows."""
        lengths = np.diff(inputs.tokens.offsets)
        sums = lengths.reshape(-1, group).sum(1)
        found = []
        for place, rows in enumerate(slices):
            order = rows[longest_first(sums[rows])]
            for number, (start, end) in enumerate(_cuts(sums[order], self.budget)):
                taken = order[start:end]
                documents = (taken[:, None] * group + np.arange(group)).reshape(-1)
                documents = documents[longest_first(lengths[documents])]
                found.append((taken, self._chunk(inputs, documents, seeds(place, number))))
        return found

    def _chunk(self, inputs: Inputs, documents: np.ndarray, seed: int) -> Chunk:
        tokens = inputs.tokens
        places, borders = gather(np.arange(len(tokens.ids)), tokens.offsets, documents)
        flat = flatten(tokens.ids[places], borders, self.padding_id, self.device)
        if inputs.kinds is not None:
            flat = replace(flat, kinds=move(inputs.kinds[places], self.device))
        return Chunk(documents, places, flat, seed)


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

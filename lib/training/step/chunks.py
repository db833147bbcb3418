"""Split a rank's texts into chunks by token budget. The split does not depend on the number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...models.forward import PackedBatch, flatten, move
from ...models.packing import gather, longest_first, next_cut, offsets_of
from .trainable import Inputs

ChunkSeeds = Callable[[int, int], int]  # (position of a virtual rank among the rank's own, number of its chunk) -> seed


@dataclass(frozen=True)
class ChunkPlan:
    """Which texts a chunk has, before its tokens are packed.

    documents: int64 [n], numbers of the rank's texts, longest first. seed: of their dropout. rows: the rank's rows that they
    belong to, where chunks consist of whole rows.
    """

    documents: np.ndarray
    seed: int
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Chunk:
    """A packed chunk on the device. tokens: int64 [t], positions of its tokens among those of all the rank's texts."""

    documents: np.ndarray
    tokens: np.ndarray
    packed: PackedBatch
    seed: int


@dataclass(frozen=True)
class Chunker:
    """Plan and pack chunks of at most `budget` tokens each. padding_id: see `models.forward.positions`.

    Chunks are packed one at a time, again in each pass: all together they would take several times the memory of the tokens.
    """

    budget: int
    device: torch.device
    padding_id: int | None

    def by_text(self, inputs: Inputs, groups: list[np.ndarray], seeds: ChunkSeeds) -> list[ChunkPlan]:
        """Plan chunks of whole texts. groups: the texts of each of the rank's virtual ranks."""
        lengths = np.diff(inputs.tokens.offsets)
        plans = []
        for position, documents in enumerate(groups):
            order = documents[longest_first(lengths[documents])]
            plans += [
                ChunkPlan(order[start:end], seeds(position, number))
                for number, (start, end) in enumerate(_ranges(lengths[order], self.budget))
            ]
        return plans

    def by_row(self, inputs: Inputs, groups: list[np.ndarray], texts: int, seeds: ChunkSeeds) -> list[ChunkPlan]:
        """Plan chunks of whole rows of `texts` texts each. groups: the rows of each of the rank's virtual ranks."""
        lengths = np.diff(inputs.tokens.offsets)
        row_lengths = lengths.reshape(-1, texts).sum(1)
        plans = []
        for position, rows in enumerate(groups):
            order = rows[longest_first(row_lengths[rows])]
            for number, (start, end) in enumerate(_ranges(row_lengths[order], self.budget)):
                chunk_rows = order[start:end]
                documents = (chunk_rows[:, None] * texts + np.arange(texts)).reshape(-1)
                by_length = documents[longest_first(lengths[documents])]
                plans.append(ChunkPlan(by_length, seeds(position, number), chunk_rows))
        return plans

    def pack(self, inputs: Inputs, plan: ChunkPlan) -> Chunk:
        """Gather the tokens of a planned chunk and move them to the device."""
        tokens = inputs.tokens
        positions, borders = gather(np.arange(len(tokens.ids)), tokens.offsets, plan.documents)
        packed = flatten(tokens.ids[positions], borders, self.padding_id, self.device)
        if inputs.token_types is not None:
            packed = replace(packed, kinds=move(inputs.token_types[positions], self.device))
        return Chunk(plan.documents, positions, packed, plan.seed)


def _ranges(lengths: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Consecutive ranges (start, end) of at most `budget` tokens; one longer text is a range by itself."""
    offsets, start, ranges = offsets_of(lengths), 0, []
    while start < len(lengths):
        end = next_cut(offsets, start, budget)
        ranges.append((start, end))
        start = end
    return ranges

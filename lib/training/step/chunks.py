"""Split a rank's texts into chunks by token budget. The split does not depend on the number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...models.forward import PackedBatch, flatten, move
from ...models.packing import gather, longest_first, plan_batches
from .trainable import Inputs

ChunkSeeds = Callable[[int, int], int]  # (position of a virtual rank among the rank's own, number of its chunk) -> seed


@dataclass(frozen=True)
class ChunkPlan:
    """Which texts a chunk has, before its tokens are packed.

    documents: int64 [n], numbers of the rank's texts, longest first. rows: of the rows that they are. seed: of their dropout.
    """

    documents: np.ndarray
    rows: np.ndarray
    seed: int


@dataclass(frozen=True)
class Chunker:
    """Plan and pack chunks of at most `budget` tokens each. padding_id: see `models.forward.positions`.

    Chunks are packed one at a time, again in each pass: all together they would take several times the memory of the tokens.
    """

    budget: int
    device: torch.device
    padding_id: int | None

    def plan(self, inputs: Inputs, groups: list[np.ndarray], texts: int, seeds: ChunkSeeds) -> list[ChunkPlan]:
        """Plan chunks of whole rows of `texts` texts each. groups: the rows of each of the rank's virtual ranks."""
        lengths = np.diff(inputs.tokens.offsets)
        row_lengths = lengths.reshape(-1, texts).sum(1)
        plans = []
        for position, group in enumerate(groups):
            for number, places in enumerate(plan_batches(row_lengths[group], self.budget)):
                rows = group[places]
                documents = (rows[:, None] * texts + np.arange(texts)).reshape(-1)
                by_length = documents[longest_first(lengths[documents])]
                plans.append(ChunkPlan(by_length, rows, seeds(position, number)))
        return plans

    def pack(self, inputs: Inputs, plan: ChunkPlan) -> tuple[PackedBatch, np.ndarray]:
        """A planned chunk on the device, and the positions of its tokens among those of all the rank's texts, int64 [t]."""
        tokens = inputs.tokens
        positions, borders = gather(np.arange(len(tokens.ids)), tokens.offsets, plan.documents)
        packed = flatten(tokens.ids[positions], borders, self.padding_id, self.device)
        if inputs.token_types is not None:
            packed = replace(packed, kinds=move(inputs.token_types[positions], self.device))
        return packed, positions

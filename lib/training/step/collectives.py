"""Collective operations of a training step, and the split of a global batch over ranks.

A global batch is split into a fixed number of virtual ranks, the largest number of ranks the run may ever have. Each rank
takes a contiguous range of virtual ranks. Chunks and dropout seeds belong to virtual ranks, so that any number of ranks
computes the same batch in the same chunks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """Rank `index` of `world`, in a global batch of `rows` rows that is split into `virtual_ranks` of equal length."""

    index: int
    world: int
    virtual_ranks: int
    rows: int

    @property
    def virtual_rank_rows(self) -> int:
        """Rows of one virtual rank."""
        return self.rows // self.virtual_ranks

    def own_virtual_ranks(self, index: int | None = None) -> range:
        """The virtual ranks of a rank, by default of this one. Ranks differ by one virtual rank at most."""
        ranges = np.array_split(np.arange(self.virtual_ranks), self.world)
        own = ranges[self.index if index is None else index]
        return range(int(own[0]), int(own[-1]) + 1)

    def row_counts(self) -> list[int]:
        """Rows of each rank."""
        return [len(self.own_virtual_ranks(index)) * self.virtual_rank_rows for index in range(self.world)]

    @property
    def first_row(self) -> int:
        """Position of this rank's first row in the global batch."""
        return self.own_virtual_ranks()[0] * self.virtual_rank_rows

    @property
    def row_count(self) -> int:
        """Rows of this rank."""
        return len(self.own_virtual_ranks()) * self.virtual_rank_rows

    def gather(self, local: Tensor) -> Tensor:
        """Gather the rows of all ranks in order: local [b, ...] -> [rows, ...]. Gradients come back summed over the ranks."""
        return local if self.world == 1 else _Gather.apply(local, self.row_counts(), self.index)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """One all-gather forward, one reduce-scatter backward. Ranks with fewer rows than others are padded to the longest."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], index: int) -> Tensor:
        ctx.counts, ctx.index = counts, index
        most, shape = max(counts), local.shape[1:]
        padded = local.new_zeros((most, *shape))
        padded[: len(local)] = local
        gathered = local.new_empty((len(counts) * most, *shape))
        dist.all_gather_into_tensor(gathered, padded)
        if min(counts) == most:
            return gathered
        return torch.cat([gathered[i * most : i * most + count] for i, count in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        most, shape = max(ctx.counts), gradients[0].shape[1:]
        padded = gradients[0].new_zeros((len(ctx.counts), most, *shape))
        for target, gradient in zip(padded, gradients[0].split(ctx.counts), strict=True):
            target[: len(gradient)] = gradient
        own = padded.new_empty((most, *shape))
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
        return own[: ctx.counts[ctx.index]], None, None


def mean_over_ranks(value: Tensor) -> Tensor:
    """Replace `value` by its mean over the ranks, in place; does nothing in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        value /= dist.get_world_size()
    return value


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)

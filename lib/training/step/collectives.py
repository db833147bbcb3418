"""What the ranks of a training step tell each other: rows gathered with their gradients, and the slices of a batch.

A global batch is cut into as many slices as there may ever be ranks. A rank takes a run of them, so that any number of
ranks, up to that, computes the same batch in the same pieces.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """A rank among `world`, where a global batch of `rows` is cut into `slices` of equal length."""

    rank: int
    world: int
    slices: int
    rows: int

    @property
    def length(self) -> int:
        """Rows a slice."""
        return self.rows // self.slices

    def own_slices(self, rank: int | None = None) -> range:
        """Slices of a rank, this one by default: a run, at most one longer than another rank's."""
        runs = np.array_split(np.arange(self.slices), self.world)
        run = runs[self.rank if rank is None else rank]
        return range(int(run[0]), int(run[-1]) + 1)

    def counts(self) -> list[int]:
        """Rows of each rank."""
        return [len(self.own_slices(rank)) * self.length for rank in range(self.world)]

    @property
    def first(self) -> int:
        """Place of this rank's first row in the global batch."""
        return self.own_slices()[0] * self.length

    def gather(self, local: Tensor) -> Tensor:
        """Rows of all ranks in order: local [b, ...] -> [rows, ...]. Gradients come back summed over the ranks."""
        return local if self.world == 1 else _Gather.apply(local, self.counts(), self.rank)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """One all-gather forward, one reduce-scatter backward. Ranks with fewer rows than others are padded to the most."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        most, shape = max(counts), local.shape[1:]
        padded = local.new_zeros((most, *shape))
        padded[: len(local)] = local
        everywhere = local.new_empty((len(counts) * most, *shape))
        dist.all_gather_into_tensor(everywhere, padded)
        if min(counts) == most:
            return everywhere
        return torch.cat([everywhere[i * most : i * most + count] for i, count in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        most, shape = max(ctx.counts), gradients[0].shape[1:]
        pieces = gradients[0].split(ctx.counts)
        padded = gradients[0].new_zeros((len(ctx.counts), most, *shape))
        for place, piece in zip(padded, pieces, strict=True):
            place[: len(piece)] = piece
        own = padded.new_empty((most, *shape))
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
        return own[: ctx.counts[ctx.rank]], None, None


def average(value: Tensor) -> Tensor:
    """The mean over the ranks, in place; nothing to do for one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        value /= dist.get_world_size()
    return value


def greatest(value: int, device: torch.device) -> int:
    """The greatest of the ranks' values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)

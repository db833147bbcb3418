"""logsumexp over the scaled dot products of two sets of vectors, tile by tile: the full matrix never exists in memory.

The forward pass stores one number a row; the backward pass recomputes each tile. Memory beside vectors and gradients: a few
tiles. `l2_normalise` is as frugal: it stores unit vectors and one number a row, where autograd would make four copies.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows and columns of a tile: 4 MiB and 64 MiB in float32, four tiles at a time. The small one is a quarter faster on CPUs.
CPU_TILE, TILE = 1024, 4096


@dataclass(frozen=True)
class ExcludedPairs:
    """Pairs to leave out: those that share a key, and those whose product is over the row's ceiling.

    row_keys: int64 [n, k]. column_keys: int64 [m] or [m, c]. ceiling: [n].
    """

    row_keys: Tensor
    column_keys: Tensor
    ceiling: Tensor | None = None

    def mask(self, rows: slice, columns: slice, products: Tensor) -> Tensor:
        """The excluded pairs of one tile, bool."""
        excluded = torch.zeros_like(products, dtype=torch.bool)
        for key in self.row_keys[rows].unbind(1):
            for other in self.column_keys[columns].unsqueeze(-1).flatten(1).unbind(1):
                excluded |= key[:, None] == other[None, :]
        if self.ceiling is not None:
            excluded |= products > self.ceiling[rows, None]
        return excluded


def log_partition(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    excluded: ExcludedPairs | None = None,
    hardness: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """log sum_j exp(scale * r_i.c_j + hardness * r_i.c_j) over the columns not excluded, [n]; -inf where there are none.

    rows: [n, d], columns: [m, d], scale: []. Gradients flow into these three, not through the hardness term or the exclusion.
    """
    # Without autocast: the backward pass does not run under it, and would recompute different tiles.
    with torch.autocast(rows.device.type, enabled=False):
        side = tile or (CPU_TILE if rows.device.type == "cpu" else TILE)
        return _LogPartition.apply(rows, columns, scale, excluded, hardness, side)  # type: ignore[no-any-return]


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        excluded: ExcludedPairs | None,
        hardness: float,
        tile: int,
    ) -> Tensor:
        result = rows.new_full((len(rows),), float("-inf"))
        for r in _tiles(len(rows), tile):
            for c in _tiles(len(columns), tile):
                _, logits = _logits(rows[r], columns[c], scale, excluded, hardness, r, c)
                result[r] = torch.logaddexp(result[r], torch.logsumexp(logits, dim=1))
        ctx.save_for_backward(rows, columns, scale, result)
        ctx.excluded, ctx.hardness, ctx.tile = excluded, hardness, tile
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, result = ctx.saved_tensors
        to_rows, to_columns, to_scale = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(scale)
        finite = torch.where(result.isfinite(), result, 0.0)  # -inf: no columns, so that all exponentials are zero
        for r in _tiles(len(rows), ctx.tile):
            for c in _tiles(len(columns), ctx.tile):
                products, logits = _logits(rows[r], columns[c], scale, ctx.excluded, ctx.hardness, r, c)
                shares = logits.sub_(finite[r, None]).exp_().mul_(gradients[0][r, None])
                to_scale += torch.dot(shares.flatten(), products.flatten())
                to_rows[r].addmm_(shares, columns[c])
                to_columns[c].addmm_(shares.T, rows[r])
        return to_rows.mul_(scale), to_columns.mul_(scale), to_scale, None, None, None


def _logits(
    rows: Tensor, columns: Tensor, scale: Tensor, excluded: ExcludedPairs | None, hardness: float, r: slice, c: slice
) -> tuple[Tensor, Tensor]:
    """Products and logits of a tile, [rows, columns]; logits are -inf where excluded."""
    products = rows @ columns.T
    logits = products * (scale + hardness)
    if excluded is not None:
        logits.masked_fill_(excluded.mask(r, c, products), float("-inf"))
    return products, logits


def l2_normalise(vectors: Tensor) -> Tensor:
    """L2-normalise over the last dimension, as torch.nn.functional.normalize."""
    return _L2Normalise.apply(vectors)  # type: ignore[no-any-return]


class _L2Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        norms = vectors.norm(dim=-1, keepdim=True).clamp_(min=1e-12)
        result = vectors / norms
        ctx.save_for_backward(result, norms)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        units, norms = (each.flatten(0, -2) for each in ctx.saved_tensors)
        upstream, result = gradients[0].reshape(units.shape), torch.empty_like(units)
        for s in _tiles(len(units), TILE):
            along = (upstream[s] * units[s]).sum(-1, keepdim=True)
            torch.sub(upstream[s], along * units[s], out=result[s]).div_(norms[s])
        return result.view(gradients[0].shape)


def _tiles(count: int, tile: int) -> list[slice]:
    """Slices of at most `tile` elements that cover `count`."""
    return [slice(start, min(start + tile, count)) for start in range(0, count, tile)]

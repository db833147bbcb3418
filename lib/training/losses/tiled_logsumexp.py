"""log sum exp of scaled products of two sets of vectors, tile by tile: the matrix of all pairs is never held.

Forward keeps one number a row; backward makes each tile again. Memory beside vectors and gradients: a few tiles. `normalised`
keeps to the same: unit vectors and a number a row, where autograd's own backward makes four copies.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows and columns; four tiles live at once. On a CPU the small one is a quarter faster than the large, too.
CPU_TILE, TILE = 1024, 4096  # 4 and 64 MiB in float32


@dataclass(frozen=True)
class Excluded:
    """Pairs that do not count: those that share a key, of rows: int64 [n, k], of columns: int64 [m] or [m, c]; and those
    whose product is over the row's ceiling, [n]."""

    rows: Tensor
    columns: Tensor
    ceiling: Tensor | None = None

    def tile(self, rows: slice, columns: slice, products: Tensor) -> Tensor:
        """bool, True where a pair is left out."""
        out = torch.zeros_like(products, dtype=torch.bool)
        for key in self.rows[rows].unbind(1):
            for other in self.columns[columns].unsqueeze(-1).flatten(1).unbind(1):
                out |= key[:, None] == other[None, :]
        if self.ceiling is not None:
            out |= products > self.ceiling[rows, None]
        return out


def log_partition(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    excluded: Excluded | None = None,
    hardness: float = 0.0,
    tile: int | None = None,
) -> Tensor:
    """log sum_j exp(scale * r_i.c_j + hardness * r_i.c_j) over the columns that count, [n]; -inf where none does.

    rows: [n, d], columns: [m, d], scale: []. Gradients flow into all three, and not through the hardness, nor through what
    is excluded.
    """
    with torch.autocast(rows.device.type, enabled=False):  # backward is not under it: its tiles would be others
        side = tile or (CPU_TILE if rows.device.type == "cpu" else TILE)
        return _LogPartition.apply(rows, columns, scale, excluded, hardness, side)  # type: ignore[no-any-return]


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        excluded: Excluded | None,
        hardness: float,
        tile: int,
    ) -> Tensor:
        result = rows.new_full((len(rows),), float("-inf"))
        for r in _slices(len(rows), tile):
            for c in _slices(len(columns), tile):
                _, logits = _logits(rows[r], columns[c], scale, excluded, hardness, r, c)
                result[r] = torch.logaddexp(result[r], torch.logsumexp(logits, dim=1))
        ctx.save_for_backward(rows, columns, scale, result)
        ctx.excluded, ctx.hardness, ctx.tile = excluded, hardness, tile
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, result = ctx.saved_tensors
        to_rows, to_columns, to_scale = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(scale)
        finite = torch.where(result.isfinite(), result, 0.0)  # a row without columns: its exponentials are all zero
        for r in _slices(len(rows), ctx.tile):
            for c in _slices(len(columns), ctx.tile):
                products, logits = _logits(rows[r], columns[c], scale, ctx.excluded, ctx.hardness, r, c)
                shares = logits.sub_(finite[r, None]).exp_().mul_(gradients[0][r, None])
                to_scale += torch.dot(shares.flatten(), products.flatten())
                to_rows[r].addmm_(shares, columns[c])
                to_columns[c].addmm_(shares.T, rows[r])
        return to_rows.mul_(scale), to_columns.mul_(scale), to_scale, None, None, None


def _logits(
    rows: Tensor, columns: Tensor, scale: Tensor, excluded: Excluded | None, hardness: float, r: slice, c: slice
) -> tuple[Tensor, Tensor]:
    """Products and logits of a tile, [rows, columns]; logits are -inf where excluded."""
    products = rows @ columns.T
    logits = products * (scale + hardness)
    if excluded is not None:
        logits.masked_fill_(excluded.tile(r, c, products), float("-inf"))
    return products, logits


def normalised(vectors: Tensor) -> Tensor:
    """L2-normalised over the last dimension, as torch.nn.functional.normalize."""
    return _Normalised.apply(vectors)  # type: ignore[no-any-return]


class _Normalised(torch.autograd.Function):
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
        for s in _slices(len(units), TILE):
            along = (upstream[s] * units[s]).sum(-1, keepdim=True)
            torch.sub(upstream[s], along * units[s], out=result[s]).div_(norms[s])
        return result.view(gradients[0].shape)


def _slices(count: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, count)) for start in range(0, count, tile)]

"""A model's forward pass over documents without padding: packed end to end, or stacked where their lengths are equal.

Both take the same flat tokens and give the same flat states; which of them a model can do is found out at load, see
selftest.py. Neither disables gradients: training calls them too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..packing import length_groups, positions_of
from .attention import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flat:
    """Documents laid end to end on the model's device.

    ids, positions: int64 [tokens]. offsets: int64 [documents + 1] on the device. borders: the same on the host.
    """

    ids: Tensor
    positions: Tensor
    offsets: Tensor
    borders: np.ndarray

    def part(self, start: int, end: int) -> "Flat":
        """Documents start to end, as views."""
        first, last = int(self.borders[start]), int(self.borders[end])
        offsets = self.offsets[start : end + 1] - first
        borders = self.borders[start : end + 1] - first
        return Flat(self.ids[first:last], self.positions[first:last], offsets, borders)


def flatten(ids: np.ndarray, borders: np.ndarray, padding_id: int | None, device: torch.device) -> Flat:
    """Move documents to the device, with the position of every token.

    ids: int [tokens]. borders: int64 [documents + 1], from 0. padding_id: see `positions`.
    """
    host = (ids.astype(np.int64), positions(ids, borders, padding_id), borders.astype(np.int64))
    if device.type == "cuda":  # pinned memory lets the copies run beside the kernels
        moved = [torch.from_numpy(array).pin_memory().to(device, non_blocking=True) for array in host]
    else:
        moved = [torch.from_numpy(array) for array in host]
    return Flat(moved[0], moved[1], moved[2], borders)


def positions(ids: np.ndarray, borders: np.ndarray, padding_id: int | None) -> np.ndarray:
    """Position ids, int64 [tokens]: from 0 in each document, or as RoBERTa counts when `padding_id` is given.

    RoBERTa counts tokens other than padding, from padding_id + 1; padding, which a text may contain, gets padding_id.
    """
    if padding_id is None:
        return positions_of(borders)
    real = (ids != padding_id).astype(np.int64)
    counted = np.concatenate(([0], np.cumsum(real)))
    before = np.repeat(counted[borders[:-1]], np.diff(borders))
    return (counted[1:] - before) * real + padding_id


def run_packed(network: "PreTrainedModel", batch: Flat) -> Tensor:
    """Hidden states [tokens, hidden] of documents end to end in one row; attention must be `attention.NAME`."""
    layout = Layout(
        offsets=batch.offsets.to(torch.int32),
        longest=int(np.diff(batch.borders).max()),
        groups=tuple(length_groups(batch.borders)),
    )
    output = network(input_ids=batch.ids[None], position_ids=batch.positions[None], packed=layout)
    return output.last_hidden_state[0]


def run_stacked(network: "PreTrainedModel", batch: Flat) -> Tensor:
    """Hidden states [tokens, hidden] of documents of one length, as a dense batch with neither mask nor padding."""
    documents = len(batch.borders) - 1
    output = network(input_ids=batch.ids.view(documents, -1))
    return output.last_hidden_state.flatten(0, 1)

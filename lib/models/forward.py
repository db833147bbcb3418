"""A model's forward pass over documents without padding: packed end to end, or stacked where their lengths are equal.

Both take the same flat tokens and give the same flat states; which of them a model can do is found out at load, see
selftest.py. Neither disables gradients: training calls them too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .attention import Keys, Layout
from .packing import length_groups, offsets_of, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedBatch:
    """Documents laid end to end on the model's device.

    ids, positions: int64 [tokens]. offsets: int64 [documents + 1] on the device. borders: the same on the host.
    kinds: token types, int64 [tokens], for models that have them. parents: int64 [documents] on the host, the document
    that comes before another as its beginning, or -1; None where none does.
    """

    ids: Tensor
    positions: Tensor
    offsets: Tensor
    borders: np.ndarray
    kinds: Tensor | None = None
    parents: np.ndarray | None = None

    def part(self, start: int, end: int) -> "PackedBatch":
        """Documents start to end, as views; without parents."""
        first, last = int(self.borders[start]), int(self.borders[end])
        offsets = self.offsets[start : end + 1] - first
        borders = self.borders[start : end + 1] - first
        kinds = None if self.kinds is None else self.kinds[first:last]
        return PackedBatch(self.ids[first:last], self.positions[first:last], offsets, borders, kinds)


def flatten(ids: np.ndarray, borders: np.ndarray, padding_id: int | None, device: torch.device) -> PackedBatch:
    """Move documents to the device, with the position of every token.

    ids: int [tokens]. borders: int64 [documents + 1], from 0. padding_id: see `positions`.
    """
    host = (ids, positions(ids, borders, padding_id), borders)
    moved_ids, places, offsets = (move(array, device) for array in host)
    return PackedBatch(moved_ids, places, offsets, borders)


def check_tokens(ids: np.ndarray, lengths: np.ndarray, vocabulary: int, longest: int) -> None:
    """Ids outside the embedding table would end a CUDA process without a usable message. Raises UsageError."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise UsageError(
            f"Token ids {ids.min()} to {ids.max()} are not all in 0 to {vocabulary - 1}: use this model's Tokenizer."
        )
    if len(lengths) and int(lengths.max()) > longest:
        raise UsageError(f"A text has {lengths.max()} tokens, the model takes {longest}: use this model's Tokenizer.")


def move(array: np.ndarray, device: torch.device) -> Tensor:
    """int64 on the device; pinned memory lets the copies run beside the kernels."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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


def run_packed(network: "PreTrainedModel", batch: PackedBatch) -> Tensor:
    """Hidden states [tokens, hidden] of documents end to end in one row; attention must be `attention.NAME`."""
    layout = Layout(
        offsets=batch.offsets.to(torch.int32),
        longest=int(np.diff(batch.borders).max()),
        groups=tuple(length_groups(batch.borders, batch.parents)),
        keys=None if batch.parents is None or not batch.ids.is_cuda else _keys(batch),
    )
    kinds = {} if batch.kinds is None else {"token_type_ids": batch.kinds[None]}
    output = network(input_ids=batch.ids[None], position_ids=batch.positions[None], packed=layout, **kinds)
    return output.last_hidden_state[0]


def _keys(batch: PackedBatch) -> Keys:
    """The keys of every document: those of its parent, then its own."""
    lengths = np.diff(batch.borders)
    parents = np.asarray(batch.parents)
    before = np.where(parents < 0, 0, lengths[parents])
    ends = offsets_of(before + lengths)
    places = np.arange(ends[-1]) - np.repeat(ends[:-1] + before, before + lengths)  # below 0 in the parent
    own = np.repeat(batch.borders[:-1], before + lengths) + places
    of_parent = np.repeat(np.where(parents < 0, 0, batch.borders[parents + 1]), before + lengths) + places
    source = np.where(places < 0, of_parent, own)
    device = batch.ids.device
    return Keys(move(source, device), move(ends, device).to(torch.int32), int((before + lengths).max()))


def run_equal_length(network: "PreTrainedModel", batch: PackedBatch) -> Tensor:
    """Hidden states [tokens, hidden] of documents of one length, as a dense batch with neither mask nor padding."""
    documents = len(batch.borders) - 1
    kinds = {} if batch.kinds is None else {"token_type_ids": batch.kinds.view(documents, -1)}
    output = network(input_ids=batch.ids.view(documents, -1), **kinds)
    return output.last_hidden_state.flatten(0, 1)

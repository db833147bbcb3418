"""Forward passes without padding: documents packed end to end in one row, or stacked where their lengths are equal.

Both take the same flat tokens and return the same flat states. self_test.py decides at load which of them is exact for a
model. Neither disables gradients, because training calls them too.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .attention import Keys, Layout
from .packing import length_groups, offsets_of, places_of, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedBatch:
    """Documents laid end to end on the model's device.

    ids, positions: int64 [tokens]. offsets: int64 [documents + 1] on the device. borders: the same on the host.
    kinds: token types, int64 [tokens], for models that have them. parents: int64 [documents] on the host: the document
    that is the prefix of this one, or -1. It is None where no document has a prefix.
    """

    ids: Tensor
    positions: Tensor
    offsets: Tensor
    borders: np.ndarray
    kinds: Tensor | None = None
    parents: np.ndarray | None = None

    def inputs(self, rows: int = 1) -> dict[str, Tensor]:
        """Return the ids, and the token types where there are some, as transformers takes them: int64 [rows, tokens / rows]."""
        named = {"input_ids": self.ids, "token_type_ids": self.kinds}
        return {name: values.view(rows, -1) for name, values in named.items() if values is not None}

    def part(self, start: int, end: int) -> "PackedBatch":
        """Return documents `start` to `end` as views, without parents."""
        first, last = int(self.borders[start]), int(self.borders[end])
        offsets = self.offsets[start : end + 1] - first
        borders = self.borders[start : end + 1] - first
        kinds = None if self.kinds is None else self.kinds[first:last]
        return PackedBatch(self.ids[first:last], self.positions[first:last], offsets, borders, kinds)


def flatten(ids: np.ndarray, borders: np.ndarray, padding_id: int | None, device: torch.device) -> PackedBatch:
    """Move documents to the device, and add the position of every token.

    ids: int [tokens]. borders: int64 [documents + 1], from 0. padding_id: see `positions`.
    """
    arrays = (ids, positions(ids, borders, padding_id), borders)
    moved_ids, places, offsets = (move(array, device) for array in arrays)
    return PackedBatch(moved_ids, places, offsets, borders)


def check_tokens(ids: np.ndarray, lengths: np.ndarray, vocabulary: int, longest: int) -> None:
    """Check ids and lengths against the model. Raises UsageError.

    An id outside the embedding table would end a CUDA process without a usable message.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise UsageError(
            f"Token ids {ids.min()} to {ids.max()} are not all in 0 to {vocabulary - 1}: use this model's Tokenizer."
        )
    if len(lengths) and int(lengths.max()) > longest:
        raise UsageError(f"A text has {lengths.max()} tokens, the model takes {longest}: use this model's Tokenizer.")


def move(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device as int64. Pinned memory lets the copy overlap with the kernels."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def positions(ids: np.ndarray, borders: np.ndarray, padding_id: int | None) -> np.ndarray:
    """Compute position ids, int64 [tokens]: from 0 in each document, or RoBERTa's where there is a `padding_id`.

    RoBERTa counts the tokens other than padding, from padding_id + 1. A padding token inside a text gets padding_id.
    """
    if padding_id is None:
        return positions_of(borders)
    is_token = (ids != padding_id).astype(np.int64)
    counted = np.concatenate(([0], np.cumsum(is_token)))
    prefix_lengths = np.repeat(counted[borders[:-1]], np.diff(borders))
    return (counted[1:] - prefix_lengths) * is_token + padding_id


def run_packed(network: "PreTrainedModel", batch: PackedBatch) -> Tensor:
    """Return the hidden states [tokens, hidden] of documents packed in one row; attention must be `attention.NAME`."""
    layout = Layout(
        offsets=batch.offsets.to(torch.int32),
        longest=int(np.diff(batch.borders).max()),
        groups=tuple(length_groups(batch.borders, batch.parents)),
        keys=None if batch.parents is None or not batch.ids.is_cuda else _keys(batch),
    )
    return network(**batch.inputs(), position_ids=batch.positions[None], packed=layout).last_hidden_state[0]


def _keys(batch: PackedBatch) -> Keys:
    """Return the keys of every document: those of its parent, then its own."""
    starts, lengths, parents = batch.borders[:-1], np.diff(batch.borders), np.asarray(batch.parents)
    prefix_lengths = np.where(parents < 0, 0, lengths[parents])
    places = places_of(np.stack([starts[parents], starts], 1).ravel(), np.stack([prefix_lengths, lengths], 1).ravel())
    key_lengths, device = prefix_lengths + lengths, batch.ids.device
    return Keys(move(places, device), move(offsets_of(key_lengths), device).to(torch.int32), int(key_lengths.max()))


def run_equal_length(network: "PreTrainedModel", batch: PackedBatch) -> Tensor:
    """Return the hidden states [tokens, hidden] of documents of one length, run as a dense batch without mask or padding."""
    return network(**batch.inputs(len(batch.borders) - 1)).last_hidden_state.flatten(0, 1)

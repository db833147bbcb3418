"""Networks for training: packed tokens in, a tuple of outputs for the loss out. Weights in float32.

Each has `backbone`, the transformers network. Its first output is one row a text, [n, ...], the others one row a token, [t, ...].
"""

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...models import self_test
from ...models.forward import PackedBatch, run_equal_length, run_packed
from ...models.load import load_network, position_start
from ...models.packing import length_groups
from ...models.pooling import Head, pool
from ...models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backbone(nn.Module):
    """A transformers network on documents without padding. mode: the one that its self-test measured to be exact."""

    def __init__(self, network: "PreTrainedModel", mode: str) -> None:
        super().__init__()
        self.network = network
        self.mode = mode

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states [tokens, hidden]. Documents must be sorted by length."""
        if self.mode == "packed":
            return run_packed(self.network, batch)
        starts = accumulate((group.count for group in length_groups(batch.borders)), initial=0)
        return torch.cat([run_equal_length(self.network, batch.part(*ends)) for ends in pairwise(starts)])


def full_precision(states: Tensor) -> torch.autocast:
    """Disable autocast for the layers after the backbone, as the encoder does: they are a thousandth of the computation."""
    return torch.autocast(states.device.type, enabled=False)


class VectorNetwork(nn.Module):
    """An embedding model: pooled vectors before normalisation and truncation, float32 [n, d]."""

    def __init__(self, spec: ModelSpec, backbone: Backbone) -> None:
        """Raises ModelError for dense layers that cannot be read."""
        super().__init__()
        self.pooling = spec.pooling
        self.backbone = backbone
        self.dense = Head(spec).layers

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        states = self.backbone(batch)
        with full_precision(states):
            return (self.dense(pool(states, batch.offsets, self.pooling)),)


def load_backbone(spec: ModelSpec, device: torch.device) -> tuple[Backbone, int | None]:
    """Load the network in float32, and the padding id for `models.forward.positions`. Raises ModelError."""
    network = load_network(spec, torch.float32, device)
    padding_id = position_start(network)
    with torch.no_grad():  # buffers made in inference mode could not take part in training
        mode = self_test.choose_mode(network, spec, padding_id, device)
    return Backbone(network, mode), padding_id

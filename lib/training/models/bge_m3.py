"""Train BGE-M3: an embedding model with two more layers on its token states, for lexical weights and token vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...models.bge_m3 import BgeM3Head
from ...models.files import BGE_M3_FILES
from ...models.forward import PackedBatch, move
from ...models.pooling import pool
from ...models.spec import ModelSpec
from ..losses import TokenOutputs, TokenTexts, at_least_float32
from ..step.grad_cache import GradCacheStep, StepInputs
from .embedder import EmbedderRowTokenizer, EmbedderTrainable
from .networks import Backbone, VectorNetwork, full_precision


class BgeM3Network(VectorNetwork):
    """An embedding model that outputs text vectors [n, d], token weights [t] and token vectors [t, w], not normalised."""

    def __init__(self, spec: ModelSpec, backbone: Backbone) -> None:
        """Load the two layers, or initialise them where the model directory has none."""
        super().__init__(spec, backbone)
        if all((Path(spec.folder) / name).is_file() for name in BGE_M3_FILES):
            head = BgeM3Head(spec)
            self.lexical, self.multiple = head.lexical, head.multiple
        else:
            self.lexical, self.multiple = nn.Linear(spec.hidden_size, 1), nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        states = self.backbone(batch)
        with full_precision(states):
            vectors = self.dense(pool(states, batch.offsets, self.pooling))
            states = at_least_float32(states)
            return vectors, functional.relu(self.lexical(states)).squeeze(1), self.multiple(states)


@dataclass(frozen=True)
class BgeM3Trainable(EmbedderTrainable):
    """An embedder whose step also passes token outputs to the loss."""

    network_class: ClassVar[type[VectorNetwork]] = BgeM3Network

    def step_factory(self) -> Callable[..., GradCacheStep]:
        special = tuple(sorted(EmbedderRowTokenizer(self).passage_tokenizer.special_ids))
        return partial(GradCacheStep, assemble=partial(token_outputs_of, special))

    def save(self, network: VectorNetwork, folder: Path) -> None:
        """Write the embedder's directory and the two layers in BGE-M3's files."""
        super().save(network, folder)
        assert isinstance(network, BgeM3Network)
        for name, layer in zip(BGE_M3_FILES, (network.lexical, network.multiple), strict=True):
            torch.save(layer.state_dict(), folder / name)


def token_outputs_of(special: tuple[int, ...], batch: StepInputs, leaves: tuple[Tensor, ...]) -> TokenOutputs:
    """Split the outputs of all the rank's tokens into those of queries and of passages."""
    weights, vectors = leaves
    offsets, ids = (move(array, weights.device) for array in (batch.tokens.offsets, batch.tokens.ids))
    count = batch.keys.count
    border = int(batch.tokens.offsets[count])
    queries = TokenTexts(ids[:border], offsets[: count + 1], weights[:border], vectors[:border])
    passages = TokenTexts(ids[border:], offsets[count:] - border, weights[border:], vectors[border:])
    return TokenOutputs(queries, passages, special)

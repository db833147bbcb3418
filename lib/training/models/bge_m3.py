"""What is trained when the loss is BGE-M3's: an embedding model, and two layers on the states of its tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...models.bge_m3 import BgeM3Head
from ...models.files import BGE_M3_FILES
from ...models.forward import PackedBatch, move
from ...models.pooling import pool
from ...models.spec import ModelSpec
from ..losses import TokenOutputs, TokenTexts
from ..step.grad_cache import GradCacheStep, StepInputs
from ..step.trainable import LoadedModel, adapted
from .embedder import Embedder, EmbedderTexts
from .networks import Backbone, VectorNetwork, full_precision, load_backbone


class BgeM3Network(VectorNetwork):
    """Vectors of texts [n, d], weights of tokens [t], vectors of tokens [t, w], not normalised."""

    def __init__(self, spec: ModelSpec, backbone: Backbone) -> None:
        """The two layers are new where the model has none."""
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
            states = states.to(torch.promote_types(states.dtype, torch.float32))
            return vectors, functional.relu(self.lexical(states)).squeeze(1), self.multiple(states)


@dataclass(frozen=True)
class BgeM3Trainable(Embedder):
    """An Embedder whose step also hands the loss what single tokens give."""

    def load(self, device: torch.device) -> LoadedModel:
        """Raises ModelError."""
        backbone, padding_id = load_backbone(self.spec, device)
        backbone.network = adapted(backbone.network, self.adapters)
        return LoadedModel(BgeM3Network(self.spec, backbone).to(device), backbone, padding_id)

    def step(self) -> Callable[..., GradCacheStep]:
        special = tuple(sorted(EmbedderTexts(self).of_passages.special_ids))
        return partial(GradCacheStep, assemble=partial(token_outputs_of, special))

    def save(self, network: VectorNetwork, folder: Path) -> None:
        """As an Embedder, with the two layers beside it, as BGE-M3 has them."""
        super().save(network, folder)
        assert isinstance(network, BgeM3Network)
        for name, layer in zip(BGE_M3_FILES, (network.lexical, network.multiple), strict=True):
            torch.save(layer.state_dict(), folder / name)


def token_outputs_of(special: tuple[int, ...], work: StepInputs, leaves: tuple[Tensor, ...]) -> TokenOutputs:
    """Leaves of all tokens of the rank, split into those of queries and of passages."""
    weights, vectors = leaves
    offsets, ids = (move(array, weights.device) for array in (work.tokens.offsets, work.tokens.ids))
    border = int(work.tokens.offsets[work.rows.count])
    queries = TokenTexts(ids[:border], offsets[: work.rows.count + 1], weights[:border], vectors[:border])
    after = offsets[work.rows.count :] - border
    return TokenOutputs(queries, TokenTexts(ids[border:], after, weights[border:], vectors[border:]), special)

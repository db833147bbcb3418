"""What is trained when the loss is of a text alone: an encoder by RetroMAE."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from ...models.forward import PackedBatch
from ...models.spec import ModelSpec, on_this_machine
from ...models.tokenizer import Tokenizer
from ..step.grad_cache import AccumulatingStep
from ..step.trainable import Inputs, LoadedModel, Texts
from .export import save_embedder
from .retromae_model import RetroMAE
from .word_masking import draw


class TextNetwork(nn.Module):
    """RetroMAE: the loss of each text, float32 [n]."""

    def __init__(self, retromae: RetroMAE) -> None:
        super().__init__()
        self.retromae = retromae

    @property
    def network(self) -> nn.Module:
        return self.retromae.network

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """What is masked is drawn as dropout is: from torch's generator, which the step sows."""
        texts = len(batch.borders) - 1
        seeds = torch.randint(2**62, (texts, 1)).numpy()
        drawn = draw(batch.ids.cpu().numpy(), batch.borders, self.retromae.words, seeds)
        return (self.retromae.losses(batch, drawn),)


@dataclass(frozen=True)
class Pretraining:
    """spec: the encoder. tokens: of a text at most. seed: of layers that begin at random."""

    spec: ModelSpec
    tokens: int
    seed: int

    def here(self) -> "Pretraining":
        return replace(self, spec=on_this_machine(self.spec))

    def texts(self) -> "PlainTexts":
        return PlainTexts(replace(self.spec, max_tokens=self.tokens))

    def load(self, device: torch.device) -> LoadedModel:
        """Raises ModelError."""
        network = TextNetwork(RetroMAE(self.spec, device=device, seed=self.seed))
        return LoadedModel(network, network, network.retromae.padding_id)

    def step(self) -> Any:
        return lambda network, loss, cutter, autocast, sharpness: AccumulatingStep(network, loss, cutter, autocast)

    def save(self, network: TextNetwork, folder: Path) -> None:
        """Write the encoder alone, as a model that is pooled as `spec` says."""
        spec = replace(self.spec, dense=())
        save_embedder(network.retromae.network, nn.Sequential(), spec, ("", ""), folder)


class PlainTexts(Texts):
    """Rows of the plan as the tokens of their one passage, [b]."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tokenizer = Tokenizer(spec)

    def __call__(self, rows: pa.Table) -> Inputs:
        return Inputs(self._tokenizer([texts[0] for texts in rows["passages"].to_pylist()]))

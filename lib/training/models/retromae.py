"""Pretrain an encoder with RetroMAE, on texts alone."""

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
from ..step.trainable import Inputs, LoadedModel, RowTokenizer
from .export import save_embedder
from .retromae_model import RetroMAE
from .word_masking import draw_masks


class TextNetwork(nn.Module):
    """RetroMAE as a network whose output is the loss of each text, float32 [n]."""

    def __init__(self, retromae: RetroMAE) -> None:
        super().__init__()
        self.retromae = retromae

    @property
    def network(self) -> nn.Module:
        return self.retromae.network

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Draw masks from torch's generator, which the step seeds for dropout, and compute the losses."""
        texts = len(batch.borders) - 1
        seeds = torch.randint(2**62, (texts, 1)).numpy()
        masks = draw_masks(batch.ids.cpu().numpy(), batch.borders, self.retromae.vocabulary, seeds)
        return (self.retromae.losses(batch, masks),)


@dataclass(frozen=True)
class RetroMAETrainable:
    """An encoder to pretrain. max_tokens: of a text. seed: of layers with random initial weights."""

    spec: ModelSpec
    max_tokens: int
    seed: int

    def on_this_machine(self) -> "RetroMAETrainable":
        return replace(self, spec=on_this_machine(self.spec))

    def row_tokenizer(self) -> "TextRowTokenizer":
        return TextRowTokenizer(replace(self.spec, max_tokens=self.max_tokens))

    def load(self, device: torch.device) -> LoadedModel:
        """Raises ModelError."""
        network = TextNetwork(RetroMAE(self.spec, device=device, seed=self.seed))
        return LoadedModel(network, network, network.retromae.padding_id)

    def step_factory(self) -> Any:
        return lambda network, loss, chunker, autocast, logit_scale: AccumulatingStep(network, loss, chunker, autocast)

    def save(self, network: TextNetwork, folder: Path) -> None:
        """Write the encoder without decoder and head, as an embedding model with the pooling of `spec`."""
        spec = replace(self.spec, dense=())
        save_embedder(network.retromae.network, nn.Sequential(), spec, ("", ""), folder)


class TextRowTokenizer(RowTokenizer):
    """Tokenize the only passage of each row of the plan, [b]."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tokenizer = Tokenizer(spec)

    def __call__(self, rows: pa.Table) -> Inputs:
        return Inputs(self._tokenizer([texts[0] for texts in rows["passages"].to_pylist()]))

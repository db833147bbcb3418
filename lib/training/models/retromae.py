"""Pretrain an encoder with RetroMAE, on texts alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from ...models.spec import ModelSpec, on_this_machine
from ...models.tokenizer import Tokenizer
from ..step.grad_cache import AccumulatingStep
from ..step.trainable import Inputs, LoadedModel
from .export import save_embedder
from .networks import load_backbone
from .retromae_model import RetroMAE


@dataclass(frozen=True)
class RetroMAETrainable:
    """An encoder to pretrain. max_tokens: of a text. seed: of layers with random initial weights."""

    spec: ModelSpec
    max_tokens: int
    seed: int

    def on_this_machine(self) -> "RetroMAETrainable":
        return replace(self, spec=on_this_machine(self.spec))

    def row_tokenizer(self) -> Callable[[pa.Table], Inputs]:
        """Tokenize the only passage of each row of the plan, [b]."""
        tokenizer = Tokenizer(replace(self.spec, max_tokens=self.max_tokens))
        return lambda rows: Inputs(tokenizer([texts[0] for texts in rows["passages"].to_pylist()]))

    def load(self, device: torch.device) -> LoadedModel:
        """Raises ModelError."""
        backbone, padding_id = load_backbone(self.spec, device)
        return LoadedModel(RetroMAE(self.spec, backbone, self.seed).to(device), backbone, padding_id)

    def step_factory(self) -> Any:
        return lambda network, loss, chunker, autocast, logit_scale: AccumulatingStep(network, loss, chunker, autocast)

    def save(self, network: RetroMAE, folder: Path) -> None:
        """Write the encoder without decoder and head, as an embedding model with the pooling of `spec`."""
        spec = replace(self.spec, dense=())
        save_embedder(network.backbone.network, nn.Sequential(), spec, ("", ""), folder)

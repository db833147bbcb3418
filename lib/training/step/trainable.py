"""What can be trained: the interface of embedder, reranker and pretraining, and low-rank adapters for any of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from ...errors import ModelError
from ...models.spec import Tokens

ALL_LINEAR = "all-linear"  # peft's name for every linear layer of the blocks


class LoadedModel(NamedTuple):
    """A loaded network: what is trained, the part of it that repeats layers, and what chunks.Cutter needs."""

    network: nn.Module
    backbone: Any
    padding_id: int | None


class Inputs(NamedTuple):
    """Texts, or pairs, as tokens. kinds: token types, int64 [tokens], for networks that have them."""

    tokens: Tokens
    kinds: np.ndarray | None = None


class Texts(Protocol):
    """Rows of the plan as the tokens that the step wants; made once a worker."""

    def __call__(self, rows: pa.Table) -> Inputs: ...


class Trainable(Protocol):
    """Picklable: it travels to every worker."""

    def here(self) -> "Trainable":
        """The same, with the model's files where they are on this machine. Raises ModelError."""
        ...

    def texts(self) -> Texts: ...

    def load(self, device: torch.device) -> LoadedModel: ...

    def step(self) -> Any:
        """What makes a step of network, loss, cutter, autocast and sharpness."""
        ...

    def save(self, network: Any, folder: Path) -> None:
        """Write a model directory; `network` has whole weights on the CPU."""
        ...


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA, Hu et al. 2021) instead of full weights. targets: names of layers by commas."""

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str = ALL_LINEAR


def adapted(network: Any, adapters: Adapters | None) -> Any:
    """The network with adapters, all else frozen; itself without. Raises ModelError where no layer has a target's name."""
    if adapters is None:
        return network
    from peft import LoraConfig, inject_adapter_in_model

    targets: Any = adapters.targets if adapters.targets == ALL_LINEAR else adapters.targets.split(",")
    config = LoraConfig(
        r=adapters.rank, lora_alpha=adapters.alpha, lora_dropout=adapters.dropout, target_modules=targets
    )
    try:
        return inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ModelError(f"--lora-targets {adapters.targets}: {error}. Name linear layers of this model") from error


def merged(network: Any) -> Any:
    """The network with its adapters multiplied into its weights, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, module.get_base_layer())
    return network

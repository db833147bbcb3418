"""The interface of what can be trained (embedder, reranker, pretraining), and low-rank adapters for any of them."""

from collections.abc import Callable
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
    """A loaded model.

    network: all weights that are trained. backbone: the module in it whose `network` is the transformers model.
    padding_id: see `models.forward.positions`.
    """

    network: nn.Module
    backbone: Any
    padding_id: int | None


class Inputs(NamedTuple):
    """Texts, or pairs, as tokens. token_types: int64 [tokens], for networks that take them."""

    tokens: Tokens
    token_types: np.ndarray | None = None


class Trainable(Protocol):
    """A model to train, as its options. It is pickled and sent to every worker."""

    def on_this_machine(self) -> "Trainable":
        """A copy whose model files are on this machine. Raises ModelError."""
        ...

    def row_tokenizer(self) -> Callable[[pa.Table], Inputs]:
        """A callable that turns rows of the plan into tokens, as the step takes them."""
        ...

    def load(self, device: torch.device) -> LoadedModel: ...

    def step_factory(self) -> Any:
        """A callable that makes a step of grad_cache from network, loss, chunker, autocast and logit_scale."""
        ...

    def save(self, network: Any, folder: Path) -> None:
        """Write a model directory. network: with full weights, on the CPU."""
        ...


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA, Hu et al. 2021) that train in place of the weights. targets: layer names, by commas."""

    rank: int
    alpha: int
    targets: str = ALL_LINEAR


def add_adapters(network: Any, adapters: Adapters | None) -> Any:
    """Add adapters and freeze all other weights; None returns the network unchanged.

    Raises ModelError where no layer has a target's name.
    """
    if adapters is None:
        return network
    from peft import LoraConfig, inject_adapter_in_model

    targets: Any = adapters.targets if adapters.targets == ALL_LINEAR else adapters.targets.split(",")
    config = LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=targets)
    try:
        return inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ModelError(f"--lora-targets {adapters.targets}: {error}. Name linear layers of this model") from error


def merge_adapters(network: Any) -> Any:
    """Merge adapters into the weights, in place, and return the network."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, module.get_base_layer())
    return network

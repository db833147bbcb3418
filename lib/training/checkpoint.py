"""State of a run at a step, in torch's distributed checkpoint format: readable at any number of ranks.

Every rank writes its part into a folder of its own; Ray uploads the parts into one and registers it when all are there. What
was not registered is never read.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

STEP = "step.json"


def save(
    folder: Path, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, sharpness: Tensor | None
) -> None:
    """Write this rank's part. All ranks call it."""
    dcp.save(_state(network, optimizer, sharpness), checkpoint_id=str(folder), no_dist=_alone())
    (folder / STEP).write_text(json.dumps({"step": step}))


def load(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, sharpness: Tensor | None) -> int:
    """Fill network and optimizer, and return the step. All ranks call it."""
    state = _state(network, optimizer, sharpness)
    dcp.load(state, checkpoint_id=str(folder), no_dist=_alone())
    set_state_dict(
        network, optimizer, model_state_dict=state["network"], optim_state_dict=state["optimizer"], options=OPTIONS
    )
    if sharpness is not None:
        sharpness.data.copy_(state["sharpness"])
    return int(json.loads((folder / STEP).read_text())["step"])


OPTIONS = StateDictOptions(strict=False)


def _state(network: nn.Module, optimizer: torch.optim.Optimizer, sharpness: Tensor | None) -> dict[str, Any]:
    of_network, of_optimizer = get_state_dict(network, optimizer, options=OPTIONS)
    state: dict[str, Any] = {"network": of_network, "optimizer": of_optimizer}
    return state if sharpness is None else state | {"sharpness": sharpness.detach()}


def whole_weights(network: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of the first rank, of a sharded network too; empty on the others. All ranks call it."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _alone() -> bool:
    return not torch.distributed.is_initialized()

"""State of a run at a step, in torch's distributed checkpoint format: readable at any number of ranks.

Every rank writes its part into a folder of its own; Ray uploads the parts into one and registers it when all are there. What
was not registered is never read.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

STEP = "step.json"


def save(folder: Path, step: int, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's part. All ranks call it."""
    dcp.save(_state(trained, optimizer), checkpoint_id=str(folder), no_dist=_alone())
    (folder / STEP).write_text(json.dumps({"step": step}))


def load(folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill weights and optimizer, and return the step. All ranks call it."""
    state = _state(trained, optimizer)
    dcp.load(state, checkpoint_id=str(folder), no_dist=_alone())
    set_state_dict(trained, optimizer, model_state_dict=state["trained"], optim_state_dict=state["optimizer"])
    return int(json.loads((folder / STEP).read_text())["step"])


def _state(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_weights, of_optimizer = get_state_dict(trained, optimizer)
    return {"trained": of_weights, "optimizer": of_optimizer}


def whole_weights(network: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of the first rank, of a sharded network too; empty on the others. All ranks call it."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _alone() -> bool:
    return not torch.distributed.is_initialized()

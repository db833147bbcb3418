"""Checkpoints in torch's distributed checkpoint format (DCP), which any number of ranks can load.

Every rank writes its own files into a local folder. Ray Train uploads them into one folder and registers the checkpoint when all
ranks are done; unregistered checkpoints are never loaded. The local executor writes over the older of two.
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
    """Write this rank's files of the checkpoint. All ranks must call it."""
    dcp.save(_state(trained, optimizer), checkpoint_id=str(folder), no_dist=not torch.distributed.is_initialized())
    (folder / STEP).write_text(json.dumps({"step": step}))


def load(folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load weights and optimizer state in place, and return the step. All ranks must call it."""
    state = _state(trained, optimizer)
    dcp.load(state, checkpoint_id=str(folder), no_dist=not torch.distributed.is_initialized())
    set_state_dict(trained, optimizer, model_state_dict=state["trained"], optim_state_dict=state["optimizer"])
    return int(json.loads((folder / STEP).read_text())["step"])


def _state(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, optimizer_state = get_state_dict(trained, optimizer)
    return {"trained": weights, "optimizer": optimizer_state}


def full_state_dict(network: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of the first rank, unsharded; empty on the other ranks. All ranks must call it."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

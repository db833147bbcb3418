"""One interval of a training in this process, in one rank: without Ray, for small runs and tests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from ..storage import directory
from ..storage.folder import Folder
from ..storage.scratch import Scratch
from . import checkpoint
from .loop import Trainer, run_steps, start
from .step.collectives import Rank
from .train_run import OUT_OF_MEMORY, TrainRun

SLOTS = ("local-checkpoint-0", "local-checkpoint-1")  # taken in turn: one of them is always whole


def run_interval(run: TrainRun, device: str, report: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    """Train to `run.until` from the newest checkpoint. report: gets the metrics of each step.

    Raises RunError where the memory of the device does not hold a chunk.
    """
    try:
        _run(run, torch.device(device), report)
    except torch.OutOfMemoryError as error:
        raise RunError(OUT_OF_MEMORY) from error


def _run(run: TrainRun, device: torch.device, report: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    trainer = start(run, Rank(0, 1, run.virtual_ranks, run.plan.stage.batch), device)
    if saved := _saved_steps(run):
        with Scratch("checkpoint") as place:
            folder = directory.download_directory(saved[max(saved)], Path(place))
            trainer.step = checkpoint.load(folder, trainer.trained, trainer.optimizer)
    run_steps(trainer, report, _save)


def _saved_steps(run: TrainRun) -> dict[int, Folder]:
    """The whole checkpoints, by their step."""
    slots = [run.output.below(name) for name in SLOTS]
    return {int(json.loads(slot.read(checkpoint.STEP))["step"]): slot for slot in slots if directory.is_complete(slot)}


def _save(trainer: Trainer) -> None:
    """Write a checkpoint over the older of the two."""
    output, saved = trainer.run.output, _saved_steps(trainer.run)
    newest = saved[max(saved)].url if saved else ""
    slot = next(slot for slot in (output.below(name) for name in SLOTS) if slot.url != newest)
    directory.remove_directory(slot)
    with Scratch("checkpoint") as place:
        state = Path(place) / "state"  # beside the lock of the scratch folder
        checkpoint.save(state, trainer.step, trainer.trained, trainer.optimizer)
        directory.upload_directory(state, slot)

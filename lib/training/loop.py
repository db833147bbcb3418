"""The training loop of one worker: load, resume, step by step, checkpoint, export."""

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..engine.malloc import return_large_blocks
from ..storage.directory import upload_directory
from ..storage.fingerprint import fingerprint
from . import checkpoint
from .data.batch_keys import batch_keys
from .data.batch_reader import BatchReader
from .metrics import publish_metrics
from .step.chunks import Chunker
from .step.collectives import Rank, mean_over_ranks
from .step.grad_cache import StepInputs, seed_of
from .step.parallel import SingleProcess, wrap_network
from .step.trainable import Inputs, LoadedModel
from .train_run import FAILURE, TrainRun

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
PREFETCH = 2  # batches read and tokenised while one is computed
DROPOUT = 1  # first word of the seeds of a step's dropout
NAMED_ROWS = 5  # of a batch, in the message of a failure


class CheckpointState(torch.nn.Module):
    """Everything that a checkpoint holds: the network, and the learned temperature where there is one."""

    def __init__(self, network: torch.nn.Module, logit_scale: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.network, self.logit_scale = network, logit_scale


@dataclass
class Trainer:
    """The state of one rank."""

    run: TrainRun
    rank: Rank
    device: torch.device
    loaded: LoadedModel
    network: SingleProcess
    optimizer: torch.optim.Optimizer
    trained: CheckpointState
    step_functions: Mapping[str, Any]
    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        return self.rank.index == 0


def train_worker(run: TrainRun, report: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Run the loop of one worker inside Ray Train. report: gets the metrics of the first rank's steps."""
    from ray import train

    run = replace(run, trainable=run.trainable.on_this_machine())
    _sweep(run)
    context = train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), run.virtual_ranks, run.plan.stage.batch)
    device = _device()
    if device.type == "cpu":
        return_large_blocks()
    trainer = start(run, rank, device)
    stored = train.get_checkpoint()
    if stored is not None:
        with stored.as_directory() as folder:
            trainer.step = checkpoint.load(Path(folder), trainer.trained, trainer.optimizer)
    run_steps(trainer, report, _save)


def start(run: TrainRun, rank: Rank, device: torch.device) -> Trainer:
    """Load and wrap the network. Raises ModelError."""
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.config.pairs.seed)  # of layers that begin at random
    loaded = run.trainable.load(device)
    loaded.network.train()
    if run.plan.stage.gradient_checkpointing:
        loaded.backbone.network.gradient_checkpointing_enable({"use_reentrant": False})
    network = wrap_network(loaded.network, run.config.compute.parallel, device, rank.world)
    logit_scale = None
    if run.config.loss.learn_temperature:
        logit_scale = torch.nn.Parameter(torch.zeros((), device=device))
    trained = CheckpointState(loaded.network, logit_scale)
    parts = (Chunker(run.token_budget, device, loaded.padding_id), _autocast(run.dtype, device), logit_scale)
    make_step = run.trainable.step_factory()
    steps = {name: make_step(network, loss, *parts) for name, loss in run.plan.losses.items()}
    optimizer = run.optimization.optimizer(trained)
    return Trainer(run, rank, device, loaded, network, optimizer, trained, steps)


def run_steps(trainer: Trainer, report: Callable[[list[dict[str, Any]]], Any], save: Callable[[Trainer], None]) -> None:
    """Run the remaining steps up to `until`, and export the model. Ends before a step whose gradients are not finite.

    report: gets the metrics of each step, in the first rank. save: writes a checkpoint.
    """
    run = trainer.run
    with closing(read_ahead(run, trainer.rank, trainer.step)) as batches:
        while trainer.step < run.until:
            row = _run_step(trainer, batches)
            if trainer.is_first:
                report([row])
            if "seconds" not in row:
                return
            trainer.metrics.append(row)
            if trainer.step % run.config.checkpoint_steps == 0 or trainer.step == run.until:
                if trainer.is_first:  # first, so that every checkpoint has the metrics of the steps before it
                    publish_metrics(run.output.below("metrics"), pa.Table.from_pylist(trainer.metrics))
                trainer.metrics.clear()
                save(trainer)
    export(trainer)


def _run_step(trainer: Trainer, batches: Iterator["RankBatch"]) -> dict[str, Any]:
    """Run a step; its metrics, without `seconds` where loss or gradients are not finite and the weights stay as they are."""
    run, began = trainer.run, time.perf_counter()
    batch = next(batches)
    step = trainer.step_functions.get(batch.dataset, trainer.step_functions[""])
    trainer.network.zero_gradients(trainer.optimizer)
    seed = seed_of(run.config.pairs.seed, trainer.step, DROPOUT)
    value = step(batch.inputs_of(trainer.rank, seed, trainer.device))
    learned = trainer.trained.logit_scale
    if learned is not None and learned.grad is not None:
        mean_over_ranks(learned.grad)
    norm = trainer.network.clip_gradients(run.optimization.clip)
    loss, tokens = _totals(trainer, float(value), len(batch.inputs.tokens.ids))
    row: dict[str, Any] = {"step": trainer.step + 1, "loss": loss, "gradient_norm": norm}
    if not np.isfinite(loss) or not np.isfinite(norm):
        _fail(trainer, batch, loss, norm)
        return row
    rate = run.optimization.rate(trainer.step + 1, run.data.steps)
    run.optimization.set_rates(trainer.optimizer, rate)
    trainer.optimizer.step()
    trainer.step += 1
    row |= {"epoch": trainer.step / run.data.epoch_steps, "lr": rate, "tokens": tokens, "dataset": batch.dataset}
    row |= {"rows": run.plan.stage.batch, "peak_flops": _peak(trainer.device) * trainer.rank.world}
    return row | {"seconds": time.perf_counter() - began}


def _totals(trainer: Trainer, value: float, tokens: int) -> tuple[float, int]:
    """The mean of the ranks' losses, and the sum of their tokens."""
    both = mean_over_ranks(torch.tensor([value, float(tokens)], dtype=torch.float64, device=trainer.device))
    return float(both[0]), round(float(both[1]) * trainer.rank.world)


def _peak(device: torch.device) -> float:
    """FLOP/s of the device in bfloat16, by its makers; 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


def export(trainer: Trainer) -> None:
    """Write the model as it is after this step to OUTPUT/exports/step-N; the file that says it is whole comes last."""
    weights = checkpoint.full_state_dict(trainer.loaded.network)
    if not trainer.is_first:
        return
    run = trainer.run
    fresh = run.trainable.load(torch.device("cpu"))  # whole and without wrappers, whatever shared it here
    fresh.network.load_state_dict(weights, assign=True)
    del weights
    with tempfile.TemporaryDirectory() as temporary:
        run.trainable.save(fresh.network.eval(), Path(temporary))
        upload_directory(Path(temporary), run.export(trainer.step))


@dataclass(frozen=True)
class RankBatch:
    """A global batch as one rank reads it: the plan's table, and the inputs of this rank's rows."""

    table: pa.Table
    inputs: Inputs

    @property
    def dataset(self) -> str:
        return self.table["dataset"][0].as_py()

    def inputs_of(self, rank: Rank, seed: int, device: torch.device) -> StepInputs:
        keys = batch_keys(self.table, rank.first_row, rank.row_count, rank.world, device)
        return StepInputs(replace(keys, virtual_rank_rows=rank.virtual_rank_rows), rank, self.inputs, seed)


def read_ahead(run: TrainRun, rank: Rank, first: int) -> Generator[RankBatch, None, None]:
    """The rank's batches from step `first` + 1 to `until`, read and tokenised by a thread ahead of their use."""
    reader, tokenize = BatchReader(run.data.url, run.output.options), run.trainable.row_tokenizer()

    def read(step: int) -> RankBatch:
        table = reader.read(step)
        return RankBatch(table, tokenize(table.slice(rank.first_row, rank.row_count)))

    thread, steps = ThreadPoolExecutor(1), iter(range(first, run.until))
    try:
        pending = deque(thread.submit(read, step) for step in islice(steps, PREFETCH))
        while pending:
            pending.extend(thread.submit(read, step) for step in islice(steps, 1))
            yield pending.popleft().result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _device() -> torch.device:
    from ray.train.torch import get_device

    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _autocast(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)  # bfloat16 would be emulated
    if dtype == "float32" or old:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=getattr(torch, dtype))


def _save(trainer: Trainer) -> None:
    """Write a checkpoint, which Ray Train uploads while the training goes on."""
    from ray import train
    from ray.train import CheckpointUploadMode

    folder = Path(tempfile.mkdtemp(prefix=_prefix(trainer.run)))
    checkpoint.save(folder, trainer.step, trainer.trained, trainer.optimizer)
    train.report(
        {"step": trainer.step},
        checkpoint=train.Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _prefix(run: TrainRun) -> str:
    """Beginning of the names of this run's folders on a worker's disk."""
    return f"shoal-checkpoint-{fingerprint(run.output.url)}-"


def _sweep(run: TrainRun) -> None:
    """Remove the folders of killed workers: nothing is being uploaded while workers start."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(run)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _fail(trainer: Trainer, batch: RankBatch, loss: float, norm: float) -> None:
    """Publish the step and rows of a loss that is not finite. Every rank sees the same numbers; the first one writes."""
    if trainer.is_first:
        sources = batch.table["source"].to_pylist()
        failure = {"step": trainer.step + 1, "loss": str(loss), "gradient_norm": str(norm), "dataset": batch.dataset}
        failure |= {"rows": sources[:NAMED_ROWS], "count": len(sources)}
        trainer.run.output.publish(FAILURE, json.dumps(failure).encode())

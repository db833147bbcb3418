"""What every worker of a training run does: load, resume, step by step, checkpoint, export."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..engine.malloc import return_large_blocks
from ..storage.directory import upload_directory
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from . import checkpoint
from .data.batch_reader import BatchReader
from .data.tensors import rows_of
from .metrics import publish_metrics
from .step.chunks import Chunker
from .step.collectives import Rank, mean_over_ranks
from .step.grad_cache import StepInputs, seed_of
from .step.optimizer import Optimization
from .step.parallel import SingleProcess, wrap_network
from .step.trainable import Inputs, LoadedModel, Trainable

FAILURE, EXPORTS = "_failure.json", "exports"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
AHEAD = 2  # batches read and tokenised while one is computed
DRAWN = 1  # what seeds are of: the dropout of a step
NAMED = 5  # rows of a batch that a failure names


@dataclass(frozen=True)
class TrainRun:
    """A run, or a leg of it, as a worker needs to know it.

    losses: by dataset, "" for all others. steps: of the whole run; until: of this leg; epoch_steps: of one pass over the
    data. virtual_ranks: see collectives.Rank. dtype: "float32" | "bfloat16". parallel: see parallel.wrap_network. checkpoint_steps:
    between two checkpoints.
    """

    subject: Trainable
    losses: Mapping[str, Any]
    plan: Folder
    output: Folder
    steps: int
    until: int
    epoch_steps: float
    global_batch: int
    virtual_ranks: int
    seed: int
    optimization: Optimization
    dtype: str = "float32"
    parallel: str = "ddp"
    token_budget: int = 4096
    gradient_checkpointing: bool = False
    learn_temperature: bool = False
    checkpoint_steps: int = 100
    threads: int | None = None


class Trained(torch.nn.Module):
    """All that is trained, as a checkpoint holds it: the network, and the learned temperature where there is one."""

    def __init__(self, network: torch.nn.Module, logit_scale: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.network, self.logit_scale = network, logit_scale


@dataclass
class Trainer:
    """A rank's state."""

    course: TrainRun
    place: Rank
    device: torch.device
    trainee: LoadedModel
    network: SingleProcess
    optimizer: torch.optim.Optimizer
    trained: "Trained"
    steps: Mapping[str, Any]
    step: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def first(self) -> bool:
        return self.place.index == 0


def work(course: TrainRun, said: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> None:
    """The loop of one worker inside Ray Train. said: what the first rank tells of its steps while they are done."""
    from ray import train

    course = replace(course, subject=course.subject.on_this_machine())
    _sweep(course)
    context = train.get_context()
    place = Rank(context.get_world_rank(), context.get_world_size(), course.virtual_ranks, course.global_batch)
    device = _device()
    if device.type == "cpu":
        return_large_blocks()
    run = start(course, place, device)
    found = train.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            run.step = checkpoint.load(Path(folder), run.trained, run.optimizer)
    for row in advance(run):
        said([row] if run.first else [])
        if not np.isfinite(row["loss"]) or not np.isfinite(row["gradient_norm"]):
            return
        if run.step % course.checkpoint_steps == 0 or run.step == course.until:
            _save(run)
    export(run)


def start(course: TrainRun, place: Rank, device: torch.device) -> Trainer:
    """Load and wrap the network. Raises ModelError."""
    if course.threads:
        torch.set_num_threads(course.threads)
    torch.manual_seed(course.seed)  # of layers that begin at random
    trainee = course.subject.load(device)
    trainee.network.train()
    if course.gradient_checkpointing:
        trainee.backbone.network.gradient_checkpointing_enable({"use_reentrant": False})
    network = wrap_network(trainee.network, course.parallel, device, place.world)
    logit_scale = torch.nn.Parameter(torch.zeros((), device=device)) if course.learn_temperature else None
    trained = Trained(trainee.network, logit_scale)
    chunker = Chunker(course.token_budget, device, trainee.padding_id)
    autocast = _autocast(course.dtype, device)
    steps = {
        name: course.subject.step_factory()(network, loss, chunker, autocast, logit_scale)
        for name, loss in course.losses.items()
    }
    optimizer = course.optimization.optimizer(trained)
    return Trainer(course, place, device, trainee, network, optimizer, trained, steps)


def advance(run: Trainer) -> Iterator[dict[str, Any]]:
    """Do the steps that are left of the leg; what is told of each. Ends before a step whose gradients are not finite."""
    course = run.course
    with Reader(course, run.place) as reader:
        while run.step < course.until:
            began = time.perf_counter()
            batch = reader.get(run.step)
            dataset = batch.dataset
            step = run.steps.get(dataset, run.steps[""])
            run.network.zero_gradients(run.optimizer)
            value = step(batch.work(run.place, seed_of(course.seed, run.step, DRAWN), run.device))
            learned = run.trained.logit_scale
            if learned is not None and learned.grad is not None:
                mean_over_ranks(learned.grad)
            norm = run.network.clip_gradients(course.optimization.clip)
            loss, tokens = _totals(run, float(value), len(batch.inputs.tokens.ids))
            if not np.isfinite(loss) or not np.isfinite(norm):
                _fail(run, batch, loss, norm)
                yield {"step": run.step + 1, "loss": loss, "gradient_norm": norm}
                return
            rate = course.optimization.rate(run.step + 1, course.steps)
            course.optimization.set_rates(run.optimizer, rate)
            run.optimizer.step()
            run.step += 1
            row: dict[str, Any] = {"step": run.step, "epoch": run.step / course.epoch_steps, "loss": loss, "lr": rate}
            row |= {"gradient_norm": norm, "tokens": tokens, "rows": course.global_batch, "dataset": dataset}
            row |= {"seconds": time.perf_counter() - began, "peak_flops": _peak(run.device) * run.place.world}
            run.metrics.append(row)
            yield row


def _totals(run: Trainer, value: float, tokens: int) -> tuple[float, int]:
    """The mean of the ranks' losses, and the sum of their tokens."""
    both = mean_over_ranks(torch.tensor([value, float(tokens)], dtype=torch.float64, device=run.device))
    return float(both[0]), round(float(both[1]) * run.place.world)


def _peak(device: torch.device) -> float:
    """FLOP/s of the device in bfloat16, by its makers; 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


def export(run: Trainer) -> None:
    """Write the model as it is after this step to OUTPUT/exports/step-N; the file that says it is whole comes last."""
    weights = checkpoint.full_state_dict(run.trainee.network)
    if not run.first:
        return
    course = run.course
    fresh = course.subject.load(torch.device("cpu"))  # whole and without wrappers, whatever shared it here
    fresh.network.load_state_dict(weights, assign=True)
    del weights
    with tempfile.TemporaryDirectory() as temporary:
        course.subject.save(fresh.network.eval(), Path(temporary))
        upload_directory(Path(temporary), course.output.below(f"{EXPORTS}/step-{run.step:07d}"))


@dataclass(frozen=True)
class Read:
    """A global batch as one rank reads it: the plan's table, and the inputs of this rank's rows."""

    table: pa.Table
    inputs: Inputs

    @property
    def dataset(self) -> str:
        return self.table["dataset"][0].as_py()

    def work(self, place: Rank, seed: int, device: torch.device) -> StepInputs:
        keys = rows_of(self.table, place.first_row, place.row_count, place.world, device)
        return StepInputs(replace(keys, virtual_rank_rows=place.virtual_rank_rows), place, self.inputs, seed)


class Reader:
    """Batches in the plan's order, read and tokenised by a thread ahead of their use."""

    def __init__(self, course: TrainRun, place: Rank) -> None:
        self._order = BatchReader(course.plan.url, course.plan.options)
        self._texts = course.subject.row_tokenizer()
        self._place, self._until = place, course.until
        self._thread = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Read]] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def get(self, step: int) -> Read:
        """The batch of step `step` + 1; the next ones are begun."""
        for coming in range(step, min(step + 1 + AHEAD, self._until)):
            if coming not in self._coming:
                self._coming[coming] = self._thread.submit(self._read, coming)
        return self._coming.pop(step).result()

    def _read(self, step: int) -> Read:
        table = self._order.read(step)
        inputs = self._texts(table.slice(self._place.first_row, self._place.row_count))
        return Read(table, inputs)


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


def _save(run: Trainer) -> None:
    """Metrics first: what a checkpoint is of is told before it can be resumed from."""
    from ray import train
    from ray.train import CheckpointUploadMode

    if run.first:
        publish_metrics(run.course.output.below("metrics"), pa.Table.from_pylist(run.metrics))
    run.metrics.clear()
    folder = Path(tempfile.mkdtemp(prefix=_prefix(run.course)))
    checkpoint.save(folder, run.step, run.trained, run.optimizer)
    train.report(
        {"step": run.step},
        checkpoint=train.Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _prefix(course: TrainRun) -> str:
    """Of this run's folders on a worker's disk."""
    return f"shoal-checkpoint-{fingerprint(course.output.url)}-"


def _sweep(course: TrainRun) -> None:
    """Remove what killed workers left: nothing is being uploaded while workers start."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(course)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _fail(run: Trainer, batch: Read, loss: float, norm: float) -> None:
    """Every rank sees the same numbers, and so comes here; the first one tells the driver."""
    if run.first:
        sources = batch.table["source"].to_pylist()
        said = {"step": run.step + 1, "loss": str(loss), "gradient_norm": str(norm), "dataset": batch.dataset}
        said |= {"rows": sources[:NAMED], "count": len(sources)}
        run.course.output.publish(FAILURE, json.dumps(said).encode())

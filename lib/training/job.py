"""The driver of a fine-tuning: plan the data, train in intervals, evaluate after each, keep the best, write the report."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..cli.options import flat
from ..engine.lease import ALL, hold_lease
from ..engine.nodes import largest_node, parse_labels
from ..engine.run_config import check_same_settings, create_run_config, read_run_config
from ..engine.workers import WorkerRequest, connect_for, require_explicit_sizes
from ..errors import UsageError
from ..storage import directory
from ..storage.folder import Folder
from .config import FinetuneConfig, FinetunePlan, plan_finetune
from .data.batch_reader import BatchReader
from .data.job import DataOptions, TrainingPlan, plan
from .losses import TEXT, describe
from .metrics import read_metrics, tensorboard
from .model_card import write_card
from .preflight import try_largest_batch
from .ray_train import Pool, environment
from .report import page
from .train_and_evaluate import best_of, check_evaluation, train_and_evaluate
from .train_run import TrainRun, make_train_run

log = logging.getLogger("shoal")

MODEL, PAGE = "model", "run.html"
STATES = 4  # weights, gradients and the two of Adam: memory of a worker over that of the weights
CPU_BUDGET, CUDA_BUDGET = 1024, 16_384  # tokens a chunk
VERSIONS = ("ray", "torch", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True)
class Finetuned:
    """The end of a training. best: the step whose model is kept; scores: by step, the main measure on the held-out queries."""

    model: str
    steps: int
    best: int
    loss: float
    scores: tuple[dict[str, Any], ...]


def finetune(config: FinetuneConfig) -> Finetuned:
    """Do the training, or the rest of it. Raises ShoalError before anything scales, for what cannot work."""
    resolved = plan_finetune(config)
    config.folder.probe()
    with hold_lease(config.folder, ALL) as check_lease:
        return _finetune(config, resolved, check_lease)


def _finetune(config: FinetuneConfig, resolved: FinetunePlan, check_lease: Callable[[], None]) -> Finetuned:
    output, settings = config.folder, _settings(config, resolved)
    stored = read_run_config(output)
    if stored is not None:
        check_same_settings(output, stored["settings"], settings)
    check_evaluation(config, resolved)
    environment()
    data = plan(_data_options(config, resolved), output, config.workers)
    _log_counts(data)
    reader = BatchReader(data.url, output.options)
    _check_names(config, reader)
    try_largest_batch(reader, resolved.losses, resolved.spec.dim, config.loss.learn_temperature)
    connect_for(config.workers)
    pool = _pool(config, resolved)
    about = {name: version(name) for name in VERSIONS}
    new = {"settings": settings, "about": about} | _decide(config, pool)
    run_config = stored or create_run_config(output, new)
    check_same_settings(output, run_config["settings"], settings)
    run = make_train_run(config, resolved, data, run_config, pool.threads or None)
    scores = train_and_evaluate(config, resolved, run, _at_most(pool, run.virtual_ranks), check_lease)
    check_lease()
    return _Finish(config, resolved, data, run, run_config, scores).write()


def _log_counts(data: TrainingPlan) -> None:
    """Log how many rows are trained on, and why others are not."""
    counts = data.counts
    log.info(
        f"data: {counts.usable:,} of {counts.rows:,} rows usable, {data.steps:,} steps, {counts.left_over:,} left over"
    )
    for kind, bad in counts.bad.items():
        log.info(f"data: {bad.count:,} rows left out, {kind}; the first is {bad.first}: {bad.reason}")
    for note in counts.notes:
        log.info(f"data: {note}")


def _check_names(config: FinetuneConfig, reader: BatchReader) -> None:
    """Raises UsageError for a loss of an unknown dataset."""
    known = list(reader.first_steps())
    for text in config.loss.dataset_loss:
        name = text.partition("=")[0]
        if name not in known:
            raise UsageError(
                f"--dataset-loss names {name!r}, and the datasets are {', '.join(known)}. Name one of them"
            )


def _decide(config: FinetuneConfig, pool: Pool) -> dict[str, Any]:
    """Values that depend on the machines at hand, and are kept for the whole run."""
    compute = config.compute
    dtype = compute.dtype if compute.dtype != "auto" else "bfloat16" if pool.gpus else "float32"
    budget = compute.token_budget or (CUDA_BUDGET if pool.gpus else CPU_BUDGET)
    # This process computes what so many workers would: a run that begins here may go on with them.
    ranks = (config.workers.max_workers or 1) if pool.in_process else pool.maximum
    return {"virtual_ranks": ranks, "dtype": dtype, "token_budget": budget}


def _settings(config: FinetuneConfig, resolved: FinetunePlan) -> dict[str, Any]:
    """Everything that fixes the losses and weights, but the data, which its plan fixes."""
    names = ["data", "weight", "max_steps", "seed", "clip", "learn_temperature", "parallel", "dtype", "token_budget"]
    names += ["evaluate_on", "evaluate_steps", "checkpoint_steps"]
    options = flat(config)
    settings = {name: options[name] for name in names}
    settings |= {
        f"stage {name}": value for name, value in asdict(resolved.stage).items() if name not in ("note", "chosen")
    }
    settings |= {"model": resolved.spec.name, "revision": resolved.spec.revision, "prompts": resolved.prompts}
    return settings | {"tokens": resolved.tokens, "pooling": resolved.spec.pooling}


def _data_options(config: FinetuneConfig, resolved: FinetunePlan) -> DataOptions:
    stage, pairs = resolved.stage, config.pairs
    return DataOptions(
        data=pairs.data,
        weight=pairs.weight,
        global_batch=stage.batch,
        group=1 if resolved.kind == TEXT else stage.group,
        epochs=stage.epochs,
        max_steps=pairs.max_steps,
        seed=pairs.seed,
    )


def _pool(config: FinetuneConfig, resolved: FinetunePlan) -> Pool:
    """Workers that the cluster has room for. Raises UsageError for a number that does not divide the batch."""
    batch, options = resolved.stage.batch, config.workers
    wanted = options.max_workers or options.min_workers
    if wanted and batch % wanted:
        near = max(count for count in range(1, wanted + 1) if batch % count == 0)
        raise UsageError(f"{wanted} workers do not divide a batch of {batch}. Take {near} workers, or another --batch")
    if options.is_local:
        workers = WorkerRequest(options).resolve()
        return Pool(1, 1, workers.cpus, workers.gpus, 0 if workers.gpus else workers.threads, in_process=True)
    require_explicit_sizes(options, resolved.spec.weight_bytes)
    cores = (
        None if options.gpus_per_worker else largest_node(parse_labels(options.worker_label))
    )  # None: there are GPUs
    sized = replace(
        options,
        min_workers=options.min_workers or options.max_workers,
        cpus_per_worker=options.cpus_per_worker or (max(1.0, cores // (wanted or 1)) if cores else None),
    )
    workers = WorkerRequest(sized, STATES * resolved.spec.weight_bytes).resolve()
    room = options.max_workers or workers.initial
    most = max(count for count in range(1, room + 1) if batch % count == 0)
    least = min(options.min_workers or most, most)
    return Pool(least, most, workers.cpus, workers.gpus, 0 if workers.gpus else workers.threads, workers.labels)


def _at_most(pool: Pool, virtual_ranks: int) -> Pool:
    """Limit the workers to the run's number of virtual ranks, which was fixed when it began."""
    return replace(pool, minimum=min(pool.minimum, virtual_ranks), maximum=min(pool.maximum, virtual_ranks))


@dataclass(frozen=True)
class _Finish:
    """The files of a finished training: the best model with its card, the curves, the page."""

    config: FinetuneConfig
    resolved: FinetunePlan
    data: TrainingPlan
    run: TrainRun
    run_config: Mapping[str, Any]
    scores: list[dict[str, Any]]

    def write(self) -> Finetuned:
        """Write all of them; the summary of the run."""
        metrics = read_metrics(self.run.output.below("metrics"))
        evaluations = [
            {"step": row["step"], row["measure"]: row[row["measure"]]} for row in self.scores if "measure" in row
        ]
        self._write_model()
        self._write_page(metrics, evaluations)
        tensorboard(self.run.output.below("tensorboard"), metrics, evaluations)
        last = metrics["loss"][-1].as_py() if metrics.num_rows else float("nan")
        return Finetuned(self._model.url, self.run.steps, self._best, last, tuple(self.scores))

    @property
    def _best(self) -> int:
        return best_of(self.scores)["step"]

    @property
    def _model(self) -> Folder:
        return self.run.output.below(MODEL)

    def _facts(self) -> dict[str, Any]:
        counts = self.data.counts
        return {
            "model": self.resolved.spec.name,
            "recipe": self.config.recipe or "none",
            "steps": self.run.steps,
            "rows a step": self.run.global_batch,
            "rows": f"{counts.usable:,} usable of {counts.rows:,}",
            "kept": f"the model of step {self._best}",
            "losses": json.dumps({name or "all": describe(loss) for name, loss in self.run.losses.items()}),
        }

    def _write_model(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = directory.download_directory(self.run.export(self._best), Path(temporary))
            about = self.run_config["about"]
            write_card(folder, self.config, self.resolved, self._facts(), self.data, self.scores, about)
            directory.upload_directory(folder, self._model)

    def _write_page(self, metrics: pa.Table, evaluations: list[dict[str, Any]]) -> None:
        measure = next((row["measure"] for row in self.scores if "measure" in row), "ndcg_at_10")
        title = f"Fine-tuning {self.resolved.spec.name}"
        settings, about = self.run_config["settings"], self.run_config["about"]
        html = page(title, self._facts(), metrics, evaluations, settings, about, measure)
        self.run.output.publish(PAGE, html.encode())

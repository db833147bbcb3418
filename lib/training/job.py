"""The driver of a fine-tuning: plan the data, train in intervals, evaluate after each, keep the best, write the report."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cli.options import flat
from ..engine.job import versions
from ..engine.lease import ALL, hold_lease
from ..engine.nodes import largest_node, parse_labels
from ..engine.run import check_same_settings, create_run_config, read_run_config
from ..engine.workers import WorkerPlan, WorkerRequest, connect_for, require_explicit_sizes
from ..errors import UsageError
from ..storage import directory
from .config import FinetuneConfig, FinetunePlan, plan_finetune
from .data.batch_reader import BatchReader
from .data.job import DataOptions, TrainingPlan, plan
from .losses import TEXT, describe
from .metrics import read_metrics, tensorboard
from .model_card import write_card
from .preflight import check_prompts, try_losses
from .ray_train import set_environment
from .report import page
from .train_and_evaluate import best_of, check_evaluation, train_and_evaluate
from .train_run import TrainRun, make_train_run

log = logging.getLogger("shoal")

MODEL, PAGE = "model", "run.html"
STATES = 4  # weights, gradients and the two of Adam: memory of a worker over that of the weights
CPU_BUDGET, CUDA_BUDGET = 1024, 16_384  # tokens a chunk
VERSIONS = ("ray", "torch", "transformers", "pyarrow", "numpy")
# Options that a resumed run must repeat, beside those of the stage. An executor does not read the other's checkpoints.
SETTINGS = (
    "executor",
    *("data", "weight", "max_steps", "seed", "clip", "learn_temperature", "parallel", "dtype", "token_budget"),
    *("evaluate_on", "evaluate_steps", "checkpoint_steps"),
)


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
    check_prompts(resolved)
    check_evaluation(config, resolved)
    set_environment()
    data = plan(_data_options(config, resolved), output, config.workers)
    _log_counts(data)
    reader = BatchReader(data.url, output.options)
    _check_names(config, reader)
    try_losses(reader, resolved.losses, resolved.spec.dim, config.loss.learn_temperature)
    connect_for(config.workers)
    workers = _plan_workers(config, resolved)
    about = versions(*VERSIONS)
    new = {"settings": settings, "about": about} | _decide(config, workers)
    run_config = stored or create_run_config(output, new)
    check_same_settings(output, run_config["settings"], settings)
    run = make_train_run(config, resolved, data, run_config, None if workers.gpus else workers.threads)
    scores = train_and_evaluate(run, workers.at_most(run.virtual_ranks), check_lease)
    check_lease()
    return _finish(run, run_config, scores)


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
            names = ", ".join(known)
            raise UsageError(f"--dataset-loss names {name!r}, and the datasets are {names}. Name one of them")


def _decide(config: FinetuneConfig, workers: WorkerPlan) -> dict[str, Any]:
    """Values that depend on the machines at hand, and are kept for the whole run."""
    compute = config.compute
    dtype = compute.dtype if compute.dtype != "auto" else "bfloat16" if workers.gpus else "float32"
    budget = compute.token_budget or (CUDA_BUDGET if workers.gpus else CPU_BUDGET)
    # This process computes what so many workers would.
    ranks = (config.workers.max_workers or 1) if workers.in_process else workers.maximum
    return {"virtual_ranks": ranks, "dtype": dtype, "token_budget": budget}


def _settings(config: FinetuneConfig, resolved: FinetunePlan) -> dict[str, Any]:
    """Everything that a resumed run must repeat; what the rows hold is in the settings of the data's plan."""
    options, stage, spec = flat(config), asdict(resolved.stage), resolved.spec
    settings = {name: options[name] for name in SETTINGS}
    settings |= {f"stage {name}": value for name, value in stage.items() if name not in ("note", "chosen")}
    settings |= {"model": spec.name, "revision": spec.revision, "prompts": resolved.prompts}
    return settings | {"tokens": resolved.tokens, "pooling": spec.pooling}


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


def _largest_divisor(batch: int, most: int) -> int:
    return max(count for count in range(1, most + 1) if batch % count == 0)


def _plan_workers(config: FinetuneConfig, resolved: FinetunePlan) -> WorkerPlan:
    """Workers that the cluster has room for. Raises UsageError for a number that does not divide the batch."""
    batch, options = resolved.stage.batch, config.workers
    wanted = options.max_workers or options.min_workers
    if wanted and batch % wanted:
        near = _largest_divisor(batch, wanted)
        raise UsageError(f"{wanted} workers do not divide a batch of {batch}. Take {near} workers, or another --batch")
    if options.is_local:
        return WorkerRequest(options).resolve()
    require_explicit_sizes(options, resolved.spec.weight_bytes)
    cores = None if options.gpus_per_worker else largest_node(parse_labels(options.worker_label))  # None: on GPUs
    sized = replace(
        options,
        min_workers=options.min_workers or options.max_workers,
        cpus_per_worker=options.cpus_per_worker or (max(1.0, cores // (wanted or 1)) if cores else None),
    )
    workers = WorkerRequest(sized, STATES * resolved.spec.weight_bytes).resolve()
    most = _largest_divisor(batch, options.max_workers or workers.initial)
    return replace(workers, minimum=min(options.min_workers or most, most), maximum=most)


def _finish(run: TrainRun, run_config: Mapping[str, Any], scores: list[dict[str, Any]]) -> Finetuned:
    """Write the best model with its card, the page and the curves; the summary of the run."""
    output, best = run.output, best_of(scores)["step"]
    metrics, model = read_metrics(output.below("metrics")), output.below(MODEL)
    facts, versions = _facts(run, best), run_config["about"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = directory.download_directory(run.export(best), Path(temporary))
        write_card(folder, run, facts, scores, versions)
        directory.upload_directory(folder, model)
    html = page(f"Fine-tuning {run.plan.spec.name}", facts, metrics, scores, run_config["settings"], versions)
    output.publish(PAGE, html.encode())
    tensorboard(output.below("tensorboard"), metrics, scores)
    loss = metrics["loss"][-1].as_py() if metrics.num_rows else float("nan")
    return Finetuned(model.url, run.data.steps, best, loss, tuple(scores))


def _facts(run: TrainRun, best: int) -> dict[str, Any]:
    counts = run.data.counts
    return {
        "model": run.plan.spec.name,
        "recipe": run.config.recipe or "none",
        "steps": run.data.steps,
        "rows a step": run.plan.stage.batch,
        "rows": f"{counts.usable:,} usable of {counts.rows:,}",
        "kept": f"the model of step {best}",
        "losses": json.dumps({name or "all": describe(loss) for name, loss in run.plan.losses.items()}),
    }

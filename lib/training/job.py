"""Fine-tune a model: plan the data, train in legs, evaluate after each, keep the best, and say what was done."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..engine.cluster import connect
from ..engine.lease import ALL, hold_lease
from ..engine.run_config import check_same_settings, create_run_config, read_run_config
from ..engine.workers import WorkerOptions, beside, largest_node, parse_labels, plan_workers, require_explicit_sizes
from ..errors import UsageError
from ..storage import directory
from ..storage.filesystem import absolute, parse_options
from ..storage.folder import Folder
from .config import FinetuneConfig, FinetunePlan, plan_finetune
from .data.batch_reader import BatchReader
from .data.job import DataOptions, Planned, plan
from .loop import EXPORTS, TrainRun
from .losses import TEXT, describe
from .losses.m3_unified import M3Unified
from .metrics import read_metrics, tensorboard
from .model_card import write_card
from .models.bge_m3 import BgeM3Trainable
from .models.embedder import EmbedderTrainable
from .models.reranker import RerankerTrainable
from .models.retromae import RetroMAETrainable
from .preflight import try_largest_batch
from .ray_train import Pool, environment
from .report import page
from .step.optimizer import Optimization
from .step.trainable import ALL_LINEAR, Adapters, Trainable
from .train_and_evaluate import best_of, check_evaluation, train_and_evaluate

log = logging.getLogger("shoal")

MODEL, PAGE = "model", "run.html"
STATES = 4  # weights, gradients and the two of Adam: memory of a worker over that of the weights
CPU_BUDGET, CUDA_BUDGET = 1024, 16_384  # tokens a chunk
VERSIONS = ("ray", "torch", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True)
class Finetuned:
    """What came of a run. best: the step whose model is kept; scores: by step, the main measure on the held-out queries."""

    model: str
    steps: int
    best: int
    loss: float
    scores: tuple[dict[str, Any], ...]


def finetune(config: FinetuneConfig) -> Finetuned:
    """Do the run, or what is left of it. Raises ShoalError before anything scales, for what cannot work."""
    output = Folder(absolute(config.output), parse_options(config.storage_option))
    choice = plan_finetune(config)
    output.probe()
    with hold_lease(output, ALL) as still_held:
        return _finetune(config, choice, output, still_held)


def _finetune(
    config: FinetuneConfig, choice: FinetunePlan, output: Folder, still_held: Callable[[], None]
) -> Finetuned:
    settings = _settings(config, choice)
    found = read_run_config(output)
    if found is not None:
        check_same_settings(output, found["settings"], settings)
    check_evaluation(config, choice)
    environment()
    planned = plan(_data(config, choice), config.output, config.storage_option)
    _tell(planned)
    order = BatchReader(planned.url, output.options)
    _check_names(config, order)
    try_largest_batch(order, choice.losses, choice.spec.dim, config.learn_temperature)
    connect()
    pool = _pool(config, choice)
    about = {name: version(name) for name in VERSIONS}
    record = found or create_run_config(output, {"settings": settings, "about": about} | _decided(config, pool))
    check_same_settings(output, record["settings"], settings)
    course = _course(config, choice, planned, output, pool, record)
    scores = train_and_evaluate(config, choice, course, _at_most(pool, record["virtual_ranks"]), still_held)
    still_held()
    return _finish(config, choice, planned, course, record, scores)


def _tell(planned: Planned) -> None:
    """What of the data is trained on, and what is not, with reasons."""
    counts = planned.counts
    log.info(
        f"data: {counts.usable:,} of {counts.rows:,} rows usable, {planned.steps:,} steps, {counts.left_over:,} left over"
    )
    for kind, bad in counts.bad.items():
        log.info(f"data: {bad.count:,} rows left out, {kind}; the first is {bad.first}: {bad.reason}")
    for note in counts.notes:
        log.info(f"data: {note}")


def _check_names(config: FinetuneConfig, order: BatchReader) -> None:
    """Raises UsageError for a loss of a dataset that there is not."""
    there = list(order.first_steps())
    for text in config.dataset_loss:
        name = text.partition("=")[0]
        if name not in there:
            raise UsageError(
                f"--dataset-loss names {name!r}, and the datasets are {', '.join(there)}. Name one of them"
            )


def _decided(config: FinetuneConfig, pool: Pool) -> dict[str, Any]:
    """What depends on the machines at hand, and is kept for the whole run."""
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if pool.gpus else "float32"
    budget = config.token_budget or (CUDA_BUDGET if pool.gpus else CPU_BUDGET)
    return {"virtual_ranks": pool.maximum, "dtype": dtype, "token_budget": budget}


def _settings(config: FinetuneConfig, choice: FinetunePlan) -> dict[str, Any]:
    """What fixes every loss and every weight, but the data, which its plan holds to the same."""
    names = ["data", "weight", "max_steps", "seed", "clip", "learn_temperature", "parallel"]
    names += ["evaluate_on", "evaluate_steps"]
    found = {name: getattr(config, name) for name in names}
    found |= {f"stage {name}": value for name, value in asdict(choice.stage).items() if name not in ("note", "chosen")}
    found |= {"model": choice.spec.name, "revision": choice.spec.revision, "prompts": choice.prompts}
    found |= {"tokens": choice.tokens, "dtype": config.dtype, "token_budget": config.token_budget}
    return found | {"pooling": choice.spec.pooling, "checkpoint_steps": config.checkpoint_steps}


def _data(config: FinetuneConfig, choice: FinetunePlan) -> DataOptions:
    stage = choice.stage
    return DataOptions(
        data=config.data,
        weight=config.weight,
        global_batch=stage.batch,
        group=1 if choice.of == TEXT else stage.group,
        epochs=stage.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        **beside(config),
    )


def _pool(config: FinetuneConfig, choice: FinetunePlan) -> Pool:
    """Workers that the cluster has room for. Raises UsageError for a number that does not divide the batch."""
    batch, asked = choice.stage.batch, config.max_workers or config.min_workers
    if asked and batch % asked:
        near = max(count for count in range(1, asked + 1) if batch % count == 0)
        raise UsageError(f"{asked} workers do not divide a batch of {batch}. Take {near} workers, or another --batch")
    require_explicit_sizes(config, choice.spec.weight_bytes)
    labels = parse_labels(config.worker_label)
    cores = None if config.gpus_per_worker else largest_node(labels)  # None where there are GPUs
    options = WorkerOptions(
        min_workers=config.min_workers or config.max_workers,
        max_workers=config.max_workers,
        cpus_per_worker=config.cpus_per_worker or (max(1.0, cores // (asked or 1)) if cores else None),
        gpus_per_worker=config.gpus_per_worker,
        worker_label=config.worker_label,
    )
    workers = plan_workers(options, STATES * choice.spec.weight_bytes)
    room = config.max_workers or workers.initial
    most = max(count for count in range(1, room + 1) if batch % count == 0)
    least = min(config.min_workers or most, most)
    return Pool(least, most, workers.cpus, workers.gpus, 0 if workers.gpus else workers.threads, workers.labels)


def _at_most(pool: Pool, virtual_ranks: int) -> Pool:
    """Limit the workers to the run's number of virtual ranks, which was fixed when it began."""
    return replace(pool, minimum=min(pool.minimum, virtual_ranks), maximum=min(pool.maximum, virtual_ranks))


def _course(
    config: FinetuneConfig, choice: FinetunePlan, planned: Planned, output: Folder, pool: Pool, record: dict[str, Any]
) -> TrainRun:
    stage = choice.stage
    return TrainRun(
        subject=_subject(choice, config.seed),
        losses=choice.losses,
        plan=Folder(planned.url, output.options),
        output=output,
        steps=planned.steps,
        until=planned.steps,
        epoch_steps=planned.epoch_steps,
        global_batch=stage.batch,
        virtual_ranks=record["virtual_ranks"],
        seed=config.seed,
        optimization=Optimization(
            stage.learning_rate, stage.schedule, stage.warmup, stage.weight_decay, stage.beta2, clip=config.clip
        ),
        dtype=record["dtype"],
        parallel=config.parallel,
        token_budget=record["token_budget"],
        gradient_checkpointing=stage.gradient_checkpointing,
        learn_temperature=config.learn_temperature,
        checkpoint_steps=config.checkpoint_steps,
        threads=pool.threads or None,
    )


def _subject(choice: FinetunePlan, seed: int) -> Trainable:
    """What the losses train. Adapters where a rank is given."""
    stage, adapters = choice.stage, None
    if stage.lora_rank:
        adapters = Adapters(
            stage.lora_rank, stage.lora_alpha or 2 * stage.lora_rank, 0.0, stage.lora_targets or ALL_LINEAR
        )
    if choice.of == TEXT:
        return RetroMAETrainable(choice.spec, choice.tokens[1], seed)
    if choice.reranker is not None:
        return RerankerTrainable(choice.reranker, adapters)
    of_tokens = any(isinstance(loss, M3Unified) for loss in choice.losses.values())
    return (BgeM3Trainable if of_tokens else EmbedderTrainable)(choice.spec, choice.prompts, choice.tokens, adapters)


def _finish(
    config: FinetuneConfig,
    choice: FinetunePlan,
    planned: Planned,
    course: TrainRun,
    record: dict[str, Any],
    scores: list[dict[str, Any]],
) -> Finetuned:
    """The best model with its card, the curves, and the page."""
    output, best = course.output, best_of(scores)
    metrics = read_metrics(output.below("metrics"))
    target = output.below(MODEL)
    facts = {
        "model": choice.spec.name,
        "recipe": config.recipe or "none",
        "steps": course.steps,
        "rows a step": course.global_batch,
        "rows": f"{planned.counts.usable:,} usable of {planned.counts.rows:,}",
        "kept": f"the model of step {best['step']}",
        "losses": json.dumps({name or "all": describe(loss) for name, loss in course.losses.items()}),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = directory.download_directory(output.below(f"{EXPORTS}/step-{best['step']:07d}"), Path(temporary))
        write_card(folder, config, choice, facts, planned, scores, record["about"])
        directory.upload_directory(folder, target)
    measured = [row for row in scores if "measure" in row]
    evaluations = [{"step": row["step"], row["measure"]: row[row["measure"]]} for row in measured]
    measure = measured[0]["measure"] if measured else "ndcg_at_10"
    html = page(
        f"Fine-tuning {choice.spec.name}", facts, metrics, evaluations, record["settings"], record["about"], measure
    )
    output.publish(PAGE, html.encode())
    tensorboard(output.below("tensorboard"), metrics, evaluations)
    last = metrics["loss"][-1].as_py() if metrics.num_rows else float("nan")
    return Finetuned(target.url, course.steps, best["step"], last, tuple(scores))

"""The intervals of a training, each up to an evaluation: train, score, keep the best model."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..cli.options import configure, flat
from ..engine.workers import WorkerPlan
from ..errors import RunError
from ..evaluation.config import EvaluateConfig
from ..evaluation.job import evaluate, resolve
from ..models.files import cache_folder
from ..models.spec import flops_per_token
from ..storage import directory
from . import local_train, ray_train
from .config import FinetuneConfig, FinetunePlan, recipe_of
from .losses import RERANKING
from .metrics import TrainingProgress, read_metrics
from .train_run import FAILURE, TrainRun

log = logging.getLogger("shoal")

SCORES = "scores.json"
BACKWARD = 3  # FLOP of a training step over those of a forward pass


def train_and_evaluate(run: TrainRun, workers: WorkerPlan, check_lease: Callable[[], None]) -> list[dict[str, Any]]:
    """Train every interval that is not done, and score its model. check_lease: raises when another driver has taken the run over."""
    output, steps, spec, evaluation = run.output, run.data.steps, run.plan.spec, run.config.evaluation
    scores = json.loads(output.read(SCORES)) if output.exists(SCORES) else []
    done = {row["step"] for row in scores}
    log.info(f"train {spec.name}, {steps:,} steps of {run.plan.stage.batch:,} rows, {workers}")
    progress = TrainingProgress(steps, BACKWARD * flops_per_token(spec, sum(run.plan.tokens) // 4))
    every = evaluation.evaluate_steps if evaluation.evaluate_on else None
    for until in [*(range(every, steps, every) if every else ()), steps]:
        if until in done:
            continue
        if not directory.is_complete(run.export(until)):
            _train_until(replace(run, until=until), workers, progress)
        check_lease()
        row: dict[str, Any] = {"step": until}
        if evaluation.evaluate_on:
            row |= _score(run, until)
        scores.append(row)
        check_lease()
        output.publish(SCORES, json.dumps(scores, indent=1).encode())
        for worse in {row["step"] for row in scores} - {best_of(scores)["step"]}:
            directory.remove_directory(run.export(worse))
    return scores


def _train_until(run: TrainRun, workers: WorkerPlan, progress: TrainingProgress) -> None:
    """Train one interval. Raises RunError naming step, rows and last checkpoint when the loss is not finite."""
    output = run.output
    output.remove(FAILURE)
    with progress.shown():
        if workers.in_process:
            local_train.run_interval(run, workers.device, progress.add)
        else:
            ray_train.run_interval(run, workers, progress.add)
    if not output.exists(FAILURE):
        return
    failure = json.loads(output.read(FAILURE))
    steps = read_metrics(output.below("metrics"))["step"]  # published with every checkpoint
    last = steps[-1].as_py() if len(steps) else 0
    good = f"the checkpoint of step {last} is the last good one" if last else "there is no checkpoint before it"
    raise RunError(
        f"step {failure['step']}: the loss is {failure['loss']}, the norm of the gradients {failure['gradient_norm']}. Its "
        f"{failure['count']} rows of {failure['dataset']} begin with {', '.join(failure['rows'])}; {good}, in {output.url}. "
        "Look at those rows, or lower --learning-rate, and start with a new --output"
    )


def _score(run: TrainRun, step: int) -> dict[str, Any]:
    """The main measure of an exported model on the held-out queries, by the evaluate job."""
    export, model = run.export(step), run.export(step).url
    if run.config.storage.storage_option and not export.is_local:
        model = str(directory.download_directory(export, cache_folder()))
    (result,) = evaluate(_evaluation(run.config, run.plan, model, f"step-{step:07d}"))
    log.info(f"step {step}: {result.main_score} {result.main:.4f}")
    return {"measure": result.main_score, result.main_score: result.main}


def check_evaluation(config: FinetuneConfig, plan: FinetunePlan) -> None:
    """Read the held-out data as an evaluation would, before anything is trained. Raises ShoalError as it would."""
    if config.evaluation.evaluate_on:
        resolve(_evaluation(config, plan, plan.spec.name, "step-0000000"))


def _evaluation(config: FinetuneConfig, plan: FinetunePlan, model: str, name: str) -> EvaluateConfig:
    trained: dict[str, Any] = {"model": model}
    if plan.kind == RERANKING:
        trained = {"reranker": model, "reranker_recipe": recipe_of(config)}
    return configure(
        EvaluateConfig,
        **trained,
        output=f"{config.output.rstrip('/')}/evaluation",
        dataset=config.evaluation.evaluate_on,
        name=name,
        dtype="float32" if config.compute.dtype == "auto" else config.compute.dtype,
        **flat(config.storage),
        **flat(replace(config.workers, min_workers=None)),
    )


def best_of(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best model, the later one of equals; the last where nothing was measured."""
    return max(scores, key=lambda row: (row.get(row.get("measure", ""), 0.0), row["step"]))

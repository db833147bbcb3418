"""The legs of a training: up to each evaluation, the score of what came of it, and of all models the best."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..engine.workers import beside
from ..errors import RunError
from ..evaluation.config import EvaluateConfig
from ..evaluation.job import evaluate, ready
from ..models.files import cache_folder
from ..models.spec import flops_per_token
from ..storage import directory
from ..storage.folder import Folder
from .config import FinetuneConfig, FinetunePlan, recipe_of
from .loop import EXPORTS, FAILURE, TrainRun
from .losses import RERANKING
from .metrics import TrainingProgress, read_metrics
from .ray_train import Pool, run_interval

log = logging.getLogger("shoal")

SCORES = "scores.json"
BACKWARD = 3  # FLOP of a training step over those of a forward pass


def train_and_evaluate(
    config: FinetuneConfig, choice: FinetunePlan, course: TrainRun, pool: Pool, still_held: Callable[[], None]
) -> list[dict[str, Any]]:
    """Every leg that is not done, and what its model scores. still_held: raises when another driver has taken the run over."""
    output = course.output
    scores = _read_scores(output)
    done = {row["step"] for row in scores}
    log.info(f"train {choice.spec.name}, {course.steps:,} steps of {course.global_batch:,} rows, {pool}")
    watch = TrainingProgress(course.steps, BACKWARD * flops_per_token(choice.spec, sum(choice.tokens) // 4))
    for until in _legs(course.steps, config.evaluate_steps if config.evaluate_on else None):
        if until in done:
            continue
        export = output.below(f"{EXPORTS}/step-{until:07d}")
        if not directory.is_complete(export):
            _leg(course, until, pool, config.keep, watch)
        still_held()
        row: dict[str, Any] = {"step": until}
        if config.evaluate_on:
            row |= _score(config, choice, export, until)
        scores.append(row)
        still_held()
        output.publish(SCORES, json.dumps(scores, indent=1).encode())
        _drop_worse(output, scores)
    return scores


def _leg(course: TrainRun, until: int, pool: Pool, keep: int, watch: TrainingProgress) -> None:
    """Train to a step. Raises RunError naming step, rows and last checkpoint when the loss is no number any more."""
    output = course.output
    if output.exists(FAILURE):
        output.publish(FAILURE, b"")
    watch.start()
    try:
        run_interval(replace(course, until=until), pool, keep, watch.add)
    finally:
        watch.stop()
    failure = output.read(FAILURE) if output.exists(FAILURE) else b""
    if failure:
        said = json.loads(failure)
        done = read_metrics(output.below("metrics"))["step"]  # they are kept with every checkpoint
        last = done[-1].as_py() if len(done) else 0
        good = f"the checkpoint of step {last} is the last good one" if last else "there is no checkpoint before it"
        raise RunError(
            f"step {said['step']}: the loss is {said['loss']}, the norm of the gradients {said['gradient_norm']}. Its "
            f"{said['count']} rows of {said['dataset']} begin with {', '.join(said['rows'])}; {good}, in {output.url}. "
            "Look at those rows, or lower --learning-rate, and start with a new --output"
        )


def _score(config: FinetuneConfig, choice: FinetunePlan, export: Folder, step: int) -> dict[str, Any]:
    """The main measure of an exported model on the held-out queries, by the evaluate verb."""
    model = (
        export.url
        if export.is_local or not config.storage_option
        else str(directory.download_directory(export, cache_folder()))
    )
    (result,) = evaluate(_evaluation(config, choice, model, f"step-{step:07d}"))
    log.info(f"step {step}: {result.main_score} {result.main:.4f}")
    return {"measure": result.main_score, result.main_score: result.main}


def check_evaluation(config: FinetuneConfig, choice: FinetunePlan) -> None:
    """Read the held-out data as an evaluation would, before anything is trained. Raises ShoalError as it would."""
    if config.evaluate_on:
        ready(_evaluation(config, choice, choice.spec.name, "step-0000000"))


def _evaluation(config: FinetuneConfig, choice: FinetunePlan, model: str, name: str) -> EvaluateConfig:
    of: dict[str, Any] = {"model": model}
    if choice.of == RERANKING:
        of = {"reranker": model, "reranker_recipe": recipe_of(config)}
    return EvaluateConfig(
        **of,
        output=f"{config.output.rstrip('/')}/evaluation",
        dataset=config.evaluate_on,
        name=name,
        dtype="float32" if config.dtype == "auto" else config.dtype,
        storage_option=config.storage_option,
        **(beside(config) | {"gpus_per_worker": config.gpus_per_worker, "cpus_per_worker": config.cpus_per_worker}),
    )


def _legs(steps: int, every: int | None) -> list[int]:
    """Steps at which training stops to evaluate: every so many, and the last one."""
    return sorted({*(range(every, steps, every) if every else ()), steps})


def _read_scores(output: Folder) -> list[dict[str, Any]]:
    return json.loads(output.read(SCORES)) if output.exists(SCORES) else []


def best_of(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best model, the later one of equals; the last where nothing was measured."""
    return max(scores, key=lambda row: (row.get(row.get("measure", ""), 0.0), row["step"]))


def _drop_worse(output: Folder, scores: Sequence[dict[str, Any]]) -> None:
    """Of the exported models the best is kept."""
    best = best_of(scores)["step"]
    for row in scores:
        if row["step"] != best:
            directory.remove_directory(output.below(f"{EXPORTS}/step-{row['step']:07d}"))

"""Fine-tune a model: plan the data, train in legs, evaluate after each, keep the best, and say what was done."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import trees
from .card import write_card
from .cluster import ClusterOptions, connect, decide, largest_node
from .errors import RunError, UsageError
from .evaluate import evaluate
from .evaluating import EvaluateConfig
from .finetuning import Choice, FinetuneConfig, choose
from .losses import RERANKING, TEXT, described
from .losses.m3_unified import M3Unified
from .models import flops_per_token
from .record import claim_record, read_record, refuse_other_settings
from .storage import Folder, absolute, parse_options
from .training.embedder import Embedder
from .training.launch import Pool, environment, run_leg
from .training.loop import EXPORTS, FAILURE, Course
from .training.optimizer import Optimization
from .training.order import Order
from .training.page import page
from .training.plan import DataOptions, Planned, plan
from .training.pretraining import Pretraining
from .training.rehearsal import rehearse
from .training.reranker import PairScorer
from .training.trainee import ALL_LINEAR, Adapters, Subject
from .training.unified import Unified
from .training.watch import Watch, read_metrics, tensorboard

MODEL, SCORES, PAGE = "model", "scores.json", "run.html"
STATES = 4  # weights, gradients and the two of Adam: memory of a worker over that of the weights
BACKWARD = 3  # FLOP of a training step over those of a forward pass
CPU_BUDGET, CUDA_BUDGET = 4096, 16_384  # tokens a chunk
VERSIONS = ("ray", "torch", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True)
class Finetuned:
    """What came of a run. best: the step whose model is kept; scores: by step, the main measure on the held-out queries."""

    model: str
    steps: int
    best: int
    loss: float
    scores: tuple[dict[str, Any], ...]


def finetune(config: FinetuneConfig, say: Callable[[str], None]) -> Finetuned:
    """Do the run, or what is left of it. Raises ShoalError before anything scales, for what cannot work."""
    choice = choose(config)
    output = Folder(absolute(config.output), parse_options(config.storage_option))
    output.probe()
    settings = _settings(config, choice)
    found = read_record(output)
    if found is not None:
        refuse_other_settings(output, found["settings"], settings)
    environment()
    planned = plan(_data(config, choice), config.output, config.storage_option, say)
    connect()
    pool = _pool(config, choice)
    about = {name: version(name) for name in VERSIONS}
    record = found or claim_record(output, {"settings": settings, "about": about, "slices": pool.maximum})
    refuse_other_settings(output, record["settings"], settings)
    course = _course(config, choice, planned, output, pool, record["slices"])
    rehearse(Order(planned.url, output.options), course.losses, choice.spec.dim)
    scores = _train(config, choice, course, _at_most(pool, record["slices"]), say)
    return _finish(config, choice, planned, course, record, scores)


def _settings(config: FinetuneConfig, choice: Choice) -> dict[str, Any]:
    """What fixes every loss and every weight, but the data, which its plan holds to the same."""
    names = ("data", "weight", "max_steps", "seed", "clip", "learn_temperature", "parallel", "evaluate_steps")
    found = {name: getattr(config, name) for name in names}
    found |= {f"stage {name}": value for name, value in asdict(choice.stage).items() if name not in ("note", "chosen")}
    found |= {"model": choice.spec.name, "revision": choice.spec.revision, "prompts": choice.prompts}
    found |= {"tokens": choice.tokens, "dtype": config.dtype, "token_budget": config.token_budget}
    return found | {"pooling": choice.spec.pooling, "checkpoint_steps": config.checkpoint_steps}


def _data(config: FinetuneConfig, choice: Choice) -> DataOptions:
    stage = choice.stage
    return DataOptions(
        data=config.data,
        weight=config.weight,
        global_batch=stage.batch,
        group=1 if choice.of == TEXT else stage.group,
        epochs=stage.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )


def _pool(config: FinetuneConfig, choice: Choice) -> Pool:
    """Workers that the cluster has room for. Raises UsageError for a number that does not divide the batch."""
    batch, asked = choice.stage.batch, config.max_workers or config.min_workers
    if asked and batch % asked:
        near = max(count for count in range(1, asked + 1) if batch % count == 0)
        raise UsageError(f"{asked} workers do not divide a batch of {batch}. Take {near} workers, or another --batch")
    options = ClusterOptions(
        min_workers=config.min_workers,
        max_workers=config.max_workers,
        cpus_per_worker=config.cpus_per_worker or (None if asked else largest_node()),
        gpus_per_worker=config.gpus_per_worker,
    )
    workers = decide(options, STATES * choice.spec.weight_bytes)
    room = config.max_workers or workers.initial
    most = max(count for count in range(1, room + 1) if batch % count == 0)
    least = min(config.min_workers or most, most)
    return Pool(least, most, workers.cpus, workers.gpus, 0 if workers.gpus else workers.threads)


def _at_most(pool: Pool, slices: int) -> Pool:
    """No more workers than the run has slices, which were fixed when it began."""
    return Pool(min(pool.minimum, slices), min(pool.maximum, slices), pool.cpus, pool.gpus, pool.threads)


def _course(
    config: FinetuneConfig, choice: Choice, planned: Planned, output: Folder, pool: Pool, slices: int
) -> Course:
    stage = choice.stage
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if pool.gpus else "float32"
    return Course(
        subject=_subject(choice, config.seed),
        losses=choice.losses,
        plan=Folder(planned.url, output.options),
        output=output,
        steps=planned.steps,
        until=planned.steps,
        epoch_steps=planned.steps / stage.epochs,
        global_batch=stage.batch,
        slices=slices,
        seed=config.seed,
        optimization=Optimization(
            stage.learning_rate, stage.schedule, stage.warmup, stage.weight_decay, stage.beta2, clip=config.clip
        ),
        dtype=dtype,
        parallel=config.parallel,
        token_budget=config.token_budget or (CUDA_BUDGET if pool.gpus else CPU_BUDGET),
        gradient_checkpointing=stage.gradient_checkpointing,
        learn_temperature=config.learn_temperature,
        checkpoint_steps=config.checkpoint_steps,
        threads=pool.threads or None,
    )


def _subject(choice: Choice, seed: int) -> Subject:
    """What the losses train. Adapters where a rank is given."""
    stage, adapters = choice.stage, None
    if stage.lora_rank:
        adapters = Adapters(
            stage.lora_rank, stage.lora_alpha or 2 * stage.lora_rank, 0.0, stage.lora_targets or ALL_LINEAR
        )
    if choice.of == TEXT:
        return Pretraining(choice.spec, choice.tokens[1], seed)
    if choice.reranker is not None:
        return PairScorer(choice.reranker, adapters)
    of_tokens = any(isinstance(loss, M3Unified) for loss in choice.losses.values())
    return (Unified if of_tokens else Embedder)(choice.spec, choice.prompts, choice.tokens, adapters)


def _train(
    config: FinetuneConfig, choice: Choice, course: Course, pool: Pool, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every leg that is not done, and what its model scores."""
    output = course.output
    scores = _read_scores(output)
    done = {row["step"] for row in scores}
    say(f"train {choice.spec.name}, {course.steps:,} steps of {course.global_batch:,} rows, {pool}")
    watch = Watch(course.steps, BACKWARD * flops_per_token(choice.spec, sum(choice.tokens) // 4))
    for until in _legs(course.steps, config.evaluate_steps if config.evaluate_on else None):
        if until in done:
            continue
        export = output.below(f"{EXPORTS}/step-{until:07d}")
        if not trees.is_whole(export):
            _leg(course, until, pool, config.keep, watch)
        row: dict[str, Any] = {"step": until}
        if config.evaluate_on:
            row |= _score(config, choice, export, until, say)
        scores.append(row)
        output.publish(SCORES, json.dumps(scores, indent=1).encode())
        _drop_worse(output, scores)
    return scores


def _leg(course: Course, until: int, pool: Pool, keep: int, watch: Watch) -> None:
    """Train to a step. Raises RunError naming step, rows and last checkpoint when the loss is no number any more."""
    output = course.output
    if output.exists(FAILURE):
        output.publish(FAILURE, b"")
    watch.start()
    try:
        run_leg(replace(course, until=until), pool, keep, watch.add)
    finally:
        watch.stop()
    failure = output.read(FAILURE) if output.exists(FAILURE) else b""
    if failure:
        said = json.loads(failure)
        last = (said["step"] - 1) // course.checkpoint_steps * course.checkpoint_steps
        good = f"the checkpoint of step {last} is the last good one" if last else "there is no checkpoint before it"
        raise RunError(
            f"step {said['step']}: the loss is {said['loss']}, the norm of the gradients {said['gradient_norm']}. Its "
            f"{said['count']} rows of {said['dataset']} begin with {', '.join(said['rows'])}; {good}, in {output.url}. "
            "Look at those rows, or lower --learning-rate, and start with a new --output"
        )


def _score(
    config: FinetuneConfig, choice: Choice, export: Folder, step: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The main measure of an exported model on the held-out queries, by the evaluate verb."""
    place = _local(export)
    of = {"reranker": str(place)} if choice.of == RERANKING else {"model": str(place)}
    settings = EvaluateConfig(
        **of,  # type: ignore[arg-type]
        output=f"{config.output.rstrip('/')}/evaluation",
        dataset=config.evaluate_on,
        name=f"step-{step:07d}",
        dtype="float32" if config.dtype == "auto" else config.dtype,
        storage_option=config.storage_option,
    )
    (result,) = evaluate(settings, say)
    say(f"step {step}: {result.main_score} {result.main:.4f}")
    return {"measure": result.main_score, result.main_score: result.main}


def _local(folder: Folder) -> Path:
    """The folder on this machine: itself, or a copy whose place depends on nothing but the folder."""
    if folder.is_local:
        return Path(folder.url)
    name = folder.url.replace("://", "/").strip("/")
    return trees.download(folder, Path(tempfile.gettempdir()) / "shoal-models" / name)


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
            trees.remove(output.below(f"{EXPORTS}/step-{row['step']:07d}"))


def _finish(
    config: FinetuneConfig,
    choice: Choice,
    planned: Planned,
    course: Course,
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
        "losses": json.dumps({name or "all": described(loss) for name, loss in course.losses.items()}),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = trees.download(output.below(f"{EXPORTS}/step-{best['step']:07d}"), Path(temporary))
        write_card(folder, config, choice, facts, planned, scores, record["about"])
        trees.upload(folder, target)
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

"""Options of a fine-tuning, and the plan that they, recipe and model resolve to before anything scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from .. import recipes
from ..cli.options import flat, group, option
from ..engine.workers import WorkerOptions
from ..errors import ModelError, UsageError
from ..models.encoder_options import ModelOptions, resolve_encoder
from ..models.modules_json import Pooling
from ..models.reranker_options import RerankerOptions, resolve_reranker
from ..models.reranker_spec import RerankSpec
from ..models.spec import ModelSpec
from ..recipes import PASSAGE_NAMES, QUERY, Recipe, RerankRecipe, TrainingStage
from ..storage.filesystem import StorageOptions, absolute
from ..storage.folder import Folder
from . import losses
from .losses import EMBEDDING, RERANKING, TEXT
from .losses.m3_unified import M3Unified
from .losses.matryoshka import Matryoshka

# For values that neither the command nor a recipe gives. Rates and temperatures are BGE's, the rest is common practice.
DEFAULTS = TrainingStage(name="", loss=("infonce",), batch=64, group=2, epochs=1, learning_rate=1e-5, warmup=0.1)
LENGTH = 512  # tokens of a query and of a passage, where the model takes as many


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """The training data, and how a step is made of it."""

    data: tuple[str, ...] = option(
        "JSONL or Parquet of query, pos, neg, ... (text alone for retromae): URL or NAME=URL. Repeat it for more.",
        many=True,
    )
    weight: tuple[str, ...] = option("NAME=2.0: how often an epoch sees that data. Repeat it for more.", (), many=True)
    batch: int | None = option("Rows a step, all workers together.", None, min=1)
    group: int | None = option("Passages a query, one of them positive. Default: 2.", None, min=1)
    epochs: int | None = option("Passes over the data.", None, min=1)
    max_steps: int | None = option("Stop after so many steps.", None, min=1)
    seed: int = option("Of order, sampling and dropout.", 0)
    query_tokens: int | None = option("Tokens of a query at most.", None, min=4)
    passage_tokens: int | None = option("Tokens of a passage or pair at most.", None, min=4)
    query_prompt: str | None = option("Before every query. Default: the recipe's.", None)
    passage_prompt: str | None = option("Before every passage. Default: the recipe's.", None)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The losses, by dataset where they differ."""

    loss: tuple[str, ...] = option(
        f"Loss, as infonce:temperature=0.02; repeated, their sum. Losses: {', '.join(losses.names())}.", (), many=True
    )
    dataset_loss: tuple[str, ...] = option("NAME=LOSS for one dataset, as sts=cosent:temperature=0.05.", (), many=True)
    matryoshka: tuple[str, ...] = option("Dimensions by commas: the loss is taken at each of them, and averaged.", ())
    learn_temperature: bool = option("Learn a factor of all temperatures.", False)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW and its schedule."""

    learning_rate: float | None = option("Peak learning rate of AdamW.", None)
    schedule: Literal["linear", "cosine", "constant"] | None = option(
        "Of the learning rate after the warm-up. Default: linear.", None
    )
    warmup: float | None = option("Share of the steps. Default: the recipe's, else 0.1.", None)
    weight_decay: float | None = option("Of matrices. Default: the recipe's, else 0.01.", None)
    clip: float = option("Most that the norm of the gradients may be.", 1.0)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Arithmetic, memory, and the weights that are trained."""

    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "Arithmetic; weights are float32. auto: bfloat16 on GPUs, float32 on CPUs.", "auto"
    )
    gradient_checkpointing: bool = option("Compute layers twice instead of keeping their states.", False)
    token_budget: int | None = option("Tokens a chunk of a step. Default: 1024 on CPUs, 16384 on GPUs.", None, min=1)
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp: every worker has all weights. fsdp: each holds a part (large models).", "ddp"
    )
    lora_rank: int | None = option("Train adapters of this rank alone.", None, min=1)
    lora_alpha: int | None = option("Scale of the adapters. Default: twice the rank.", None)
    lora_targets: str | None = option("Layers with adapters, by commas. Default: all linear ones.", None)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The held-out data, and when it is scored."""

    evaluate_on: str | None = option(
        "Held-out queries: folder of a BEIR dataset. Scored at the end, and in between.", None
    )
    evaluate_steps: int | None = option("Steps between two evaluations. Default: none before the end.", None, min=1)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Options of `jobs/finetune_model.py`. A value comes from the command, else from the recipe, else from DEFAULTS."""

    output: str = option("Folder of the run; any fsspec URL. The same command resumes there.")
    pairs: PairOptions
    model: str | None = option("Model to begin from: directory or hub id.", None)
    recipe: str | None = option(f"Published training: {', '.join(recipes.stages())}.", None)
    pooling: Pooling | None = option("Pooling. Default: the recipe's, else the model's.", None)
    loss: LossOptions = group(LossOptions)
    optimizer: OptimizerOptions = group(OptimizerOptions)
    compute: ComputeOptions = group(ComputeOptions)
    evaluation: EvaluationOptions = group(EvaluationOptions)
    checkpoint_steps: int = option("Steps between checkpoints.", 100, min=1)
    keep: int = option("Checkpoints to keep.", 2, min=1)
    workers: WorkerOptions = group(WorkerOptions)
    storage: StorageOptions = group(StorageOptions)

    @property
    def folder(self) -> Folder:
        """The output folder; a local path is made absolute, as processes of a cluster have other current folders."""
        return Folder(absolute(self.output), self.storage.fsspec)


@dataclass(frozen=True)
class FinetunePlan:
    """Every decision of a training, but the data's.

    kind: EMBEDDING | RERANKING | TEXT. stage: the numbers of command, recipe and defaults. losses: by dataset, "" for all
    others. spec: the model that is trained; reranker: how pairs go through it. prompts, tokens: of a query and of a passage.
    """

    kind: str
    stage: TrainingStage
    losses: Mapping[str, Any]
    spec: ModelSpec
    reranker: RerankSpec | None
    prompts: tuple[str, str]
    tokens: tuple[int, int]


def plan_finetune(config: FinetuneConfig) -> FinetunePlan:
    """Resolve the command with recipe, losses and model. Raises UsageError and ModelError, within seconds."""
    stage = _stage(config)
    _check_numbers(config, stage)
    by_dataset = _losses(config, stage)
    kind = by_dataset[""].kind
    name = recipe_of(config)
    recipe = recipes.load(name) if name else None
    model = config.model or stage.start
    if model is None:
        why = f": what {config.recipe} began from is not published, or is to be trained first" if config.recipe else ""
        raise UsageError(f"no --model{why}. Give the model to begin from, as --model BAAI/bge-base-zh-v1.5")
    _refuse_unused(kind, config, stage)
    _refuse_other_kind(kind, recipe, config)
    if kind == RERANKING:
        reranker = resolve_reranker(RerankerOptions(model=model, recipe=name, max_tokens=stage.passage_tokens))
        tokens = (reranker.limit, reranker.limit)
        return FinetunePlan(kind, stage, by_dataset, reranker.model, reranker, ("", ""), tokens)
    spec, prompts = _encoder(config, stage, model)
    if not spec.include_prompt and any(prompts):
        raise ModelError(f"{model} leaves its prompt out of the pooling, which is not trained. Give --query-prompt ''")
    tokens = (_length(stage.query_tokens, spec), _length(stage.passage_tokens, spec))
    return FinetunePlan(kind, stage, by_dataset, spec, None, prompts, tokens)


def _stage(config: FinetuneConfig) -> TrainingStage:
    """The command's numbers over the recipe's over DEFAULTS."""
    published = recipes.stage(config.recipe)[1] if config.recipe else DEFAULTS
    command, values = flat(config), {}
    for each in fields(TrainingStage):
        candidates = [command.get(each.name), getattr(published, each.name), getattr(DEFAULTS, each.name)]
        values[each.name] = next((value for value in candidates if value not in (None, ())), candidates[-1])
    values["matryoshka"] = _dims(config.loss.matryoshka, published)
    values["gradient_checkpointing"] = config.compute.gradient_checkpointing or published.gradient_checkpointing
    return TrainingStage(**values)


def _check_numbers(config: FinetuneConfig, stage: TrainingStage) -> None:
    """Raises UsageError for numbers with which nothing could be trained."""
    bounds = {"learning_rate": (0.0, 10.0), "warmup": (0.0, 1.0), "weight_decay": (0.0, 10.0)}
    values = {name: getattr(stage, name) for name in bounds} | {"clip": config.optimizer.clip}
    for name, value in values.items():
        least, most = bounds.get(name, (0.0, float("inf")))
        if not least <= value <= most or (value == 0 and name in ("learning_rate", "clip")):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value} is out of range: give a number over {least:g} and up to {most:g}")


def _refuse_unused(kind: str, config: FinetuneConfig, stage: TrainingStage) -> None:
    """Raises UsageError for an option that this kind of training would not look at."""
    unused = {
        EMBEDDING: (),
        RERANKING: ("query_prompt", "passage_prompt", "pooling", "query_tokens"),
        TEXT: ("query_prompt", "passage_prompt", "query_tokens", "group", "lora_rank"),
    }
    command, evaluation = flat(config), config.evaluation
    set_in_vain = [name for name in unused[kind] if command[name] is not None]
    lora = [name for name in ("lora_targets", "lora_alpha") if command[name] is not None]
    set_in_vain += [] if stage.lora_rank else lora
    set_in_vain += ["evaluate_steps"] if evaluation.evaluate_steps and not evaluation.evaluate_on else []
    if set_in_vain:
        flag = "--" + set_in_vain[0].replace("_", "-")
        raise UsageError(
            f"{flag} has no meaning here, where the loss is of {kind} and nothing asks for it. Leave it out"
        )


def _dims(words: Sequence[str], published: TrainingStage) -> tuple[int, ...]:
    try:
        return tuple(int(dim) for dim in words) or published.matryoshka
    except ValueError as error:
        raise UsageError(f"--matryoshka {','.join(words)}: give numbers by commas, as 64,128,256") from error


def _losses(config: FinetuneConfig, stage: TrainingStage) -> Mapping[str, Any]:
    """By dataset; "" for all others. Raises UsageError."""
    by_dataset = {"": losses.parse(stage.loss)}
    for text in stage.dataset_loss:
        name, equals, loss = text.partition("=")
        if not equals:
            raise UsageError(f"--dataset-loss {text!r} is not NAME=LOSS, as sts=cosent:temperature=0.05")
        by_dataset[name] = losses.parse((loss,))
    kinds = sorted({loss.kind for loss in by_dataset.values()})
    if len(kinds) > 1:
        raise UsageError(f"the losses are of {' and '.join(kinds)}. A model is trained with losses of one kind")
    if stage.matryoshka and kinds != [EMBEDDING]:
        raise UsageError(f"--matryoshka is of vectors, and the loss is of {kinds[0]}. Leave one of them out")
    if config.loss.learn_temperature and kinds != [EMBEDDING]:
        raise UsageError(f"--learn-temperature is of losses of vectors, and this one is of {kinds[0]}. Leave it out")
    dims = stage.matryoshka
    single = [each for loss in by_dataset.values() for each in getattr(loss, "losses", (loss,))]
    unified = any(isinstance(each, M3Unified) for each in single)
    if unified and (dims or len(by_dataset) > 1 or not isinstance(by_dataset[""], M3Unified)):
        raise UsageError("m3-unified goes with no other loss and with no --matryoshka. Leave the others out")
    if not dims:
        return by_dataset
    return {name: Matryoshka(loss, dims, (1.0 / len(dims),) * len(dims)) for name, loss in by_dataset.items()}


def recipe_of(config: FinetuneConfig) -> str | None:
    """The recipe that the stage is in, which fixes how its model is used."""
    return recipes.stage(config.recipe)[0] if config.recipe else None


def _refuse_other_kind(kind: str, recipe: Any, config: FinetuneConfig) -> None:
    kinds = {EMBEDDING: Recipe, TEXT: Recipe, RERANKING: RerankRecipe}
    if recipe is not None and not isinstance(recipe, kinds[kind]):
        known = ", ".join(losses.names())
        raise UsageError(
            f"--loss is of {kind}, and --recipe {config.recipe} trains another kind of model. Losses: {known}"
        )


def _encoder(config: FinetuneConfig, stage: TrainingStage, model: str) -> tuple[ModelSpec, tuple[str, str]]:
    """The model as it will be used, and the prompts of queries and passages."""
    encoder = resolve_encoder(ModelOptions(model=model, recipe=recipe_of(config), pooling=config.pooling))
    spec = encoder.spec
    wrong = [dim for dim in stage.matryoshka if not 1 <= dim <= spec.dim]
    if wrong:
        raise UsageError(f"--matryoshka {wrong}: the vectors of {model} have {spec.dim} dimensions. Give no more")
    query = encoder.prompts.get(QUERY, "") if stage.query_prompt is None else stage.query_prompt
    published = next((encoder.prompts[name] for name in PASSAGE_NAMES if name in encoder.prompts), "")
    passage = published if stage.passage_prompt is None else stage.passage_prompt
    return spec, (query, passage)


def _length(tokens: int | None, spec: ModelSpec) -> int:
    if tokens is not None and tokens > spec.max_tokens:
        raise UsageError(f"{tokens} tokens a text, but {spec.name} takes {spec.max_tokens}. Ask for no more")
    return tokens or min(LENGTH, spec.max_tokens)

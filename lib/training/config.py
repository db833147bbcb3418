"""What a fine-tuning run is told, and what is decided from it before anything scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .. import recipes
from ..engine.workers import WorkerOptions
from ..errors import ModelError, UsageError
from ..models.encoder_options import ModelOptions, resolve_encoder
from ..models.reranker_options import RerankerOptions, resolve_reranker
from ..models.reranker_spec import RerankSpec
from ..models.spec import ModelSpec
from ..recipes import PASSAGE_NAMES, QUERY, Recipe, RerankRecipe, Stage
from . import losses
from .losses import EMBEDDING, RERANKING, TEXT
from .losses.m3_unified import M3Unified
from .losses.matryoshka import Matryoshka

# Where neither the command nor a recipe says it. Rates and temperatures are BGE's, the rest is common practice.
DEFAULTS = Stage(name="", loss=("infonce",), batch=64, group=2, epochs=1, learning_rate=1e-5, warmup=0.1)
LENGTH = 512  # tokens of a query and of a passage, where the model takes as many


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(WorkerOptions):
    """Everything `jobs/finetune_model.py` can be told. What is not given comes from the recipe, then from DEFAULTS."""

    output: str = field(metadata={"help": "Folder of the run; any fsspec URL. The same command resumes there."})
    data: tuple[str, ...] = field(
        metadata={
            "help": "JSONL or Parquet of query, pos, neg, ... (text alone for retromae): URL or NAME=URL. Repeat it for more.",
            "many": True,
        }
    )
    model: str | None = field(default=None, metadata={"help": "Model to begin from: directory or hub id."})
    recipe: str | None = field(default=None, metadata={"help": f"Published training: {', '.join(recipes.stages())}."})
    weight: tuple[str, ...] = field(
        default=(), metadata={"help": "NAME=2.0: how often an epoch sees that data. Repeat it for more.", "many": True}
    )
    loss: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": f"Loss, as infonce:temperature=0.02; repeated, their sum. Losses: {', '.join(losses.names())}.",
            "many": True,
        },
    )
    dataset_loss: tuple[str, ...] = field(
        default=(), metadata={"help": "NAME=LOSS for one dataset, as sts=cosent:temperature=0.05.", "many": True}
    )
    matryoshka: tuple[str, ...] = field(
        default=(), metadata={"help": "Dimensions by commas: the loss is taken at each of them, and averaged."}
    )
    learn_temperature: bool = field(default=False, metadata={"help": "Learn a factor of all temperatures."})
    batch: int | None = field(default=None, metadata={"help": "Rows a step, all workers together.", "min": 1})
    group: int | None = field(
        default=None, metadata={"help": "Passages a query, one of them positive. Default: 2.", "min": 1}
    )
    epochs: int | None = field(default=None, metadata={"help": "Passes over the data.", "min": 1})
    max_steps: int | None = field(default=None, metadata={"help": "Stop after so many steps.", "min": 1})
    seed: int = field(default=0, metadata={"help": "Of order, sampling and dropout."})
    query_tokens: int | None = field(default=None, metadata={"help": "Tokens of a query at most.", "min": 4})
    passage_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a passage or pair at most.", "min": 4}
    )
    query_prompt: str | None = field(default=None, metadata={"help": "Before every query. Default: the recipe's."})
    passage_prompt: str | None = field(default=None, metadata={"help": "Before every passage. Default: the recipe's."})
    pooling: Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"] | None = field(
        default=None, metadata={"help": "Pooling. Default: the recipe's, else the model's."}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of AdamW."})
    schedule: Literal["linear", "cosine", "constant"] | None = field(
        default=None, metadata={"help": "Of the learning rate after the warm-up. Default: linear."}
    )
    warmup: float | None = field(
        default=None, metadata={"help": "Share of the steps. Default: the recipe's, else 0.1."}
    )
    weight_decay: float | None = field(
        default=None, metadata={"help": "Of matrices. Default: the recipe's, else 0.01."}
    )
    clip: float = field(default=1.0, metadata={"help": "Most that the norm of the gradients may be."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Arithmetic; weights are float32. auto: bfloat16 on GPUs, float32 on CPUs."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute layers twice instead of keeping their states."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Tokens a chunk of a step. Default: 1024 on CPUs, 16384 on GPUs.", "min": 1}
    )
    parallel: Literal["ddp", "fsdp"] = field(
        default="ddp", metadata={"help": "ddp: every worker has all weights. fsdp: each holds a part (large models)."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train adapters of this rank alone.", "min": 1})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapters. Default: twice the rank."})
    lora_targets: str | None = field(
        default=None, metadata={"help": "Layers with adapters, by commas. Default: all linear ones."}
    )
    checkpoint_steps: int = field(default=100, metadata={"help": "Steps between checkpoints.", "min": 1})
    keep: int = field(default=2, metadata={"help": "Checkpoints to keep.", "min": 1})
    evaluate_on: str | None = field(
        default=None,
        metadata={"help": "Held-out queries: folder of a BEIR dataset. Scored at the end, and in between."},
    )
    evaluate_steps: int | None = field(
        default=None, metadata={"help": "Steps between two evaluations. Default: none before the end.", "min": 1}
    )
    storage_option: tuple[str, ...] = field(
        default=(),
        metadata={"help": "fsspec option, as endpoint_url=http://host:9000. Repeat it for more.", "many": True},
    )


@dataclass(frozen=True)
class FinetunePlan:
    """The decisions. of: EMBEDDING | RERANKING | TEXT. stage: every number of the training. spec: the model that is trained;
    reranker: how pairs go through it. given: what the command, the recipe and the defaults said, for the record."""

    of: str
    stage: Stage
    losses: Mapping[str, Any]
    spec: ModelSpec
    reranker: RerankSpec | None
    prompts: tuple[str, str]
    tokens: tuple[int, int]


def plan_finetune(config: FinetuneConfig) -> FinetunePlan:
    """Hold the command against recipe, losses and model. Raises UsageError and ModelError, within seconds."""
    stage = _stage(config)
    _check_numbers(config, stage)
    by_dataset = _losses(config, stage)
    of = by_dataset[""].kind
    name = recipe_of(config)
    recipe = recipes.load(name) if name else None
    model = config.model or stage.start
    if model is None:
        why = f": what {config.recipe} began from is not published, or is to be trained first" if config.recipe else ""
        raise UsageError(f"no --model{why}. Give the model to begin from, as --model BAAI/bge-base-zh-v1.5")
    _refuse_unused(of, config, stage)
    _refuse_other_kind(of, recipe, config)
    if of == RERANKING:
        reranker = resolve_reranker(RerankerOptions(model=model, recipe=name, max_tokens=stage.passage_tokens))
        limit = reranker.limit
        return FinetunePlan(of, stage, by_dataset, reranker.model, reranker, ("", ""), (limit, limit))
    spec, prompts = _encoder(config, stage, model)
    if not spec.include_prompt and any(prompts):
        raise ModelError(f"{model} leaves its prompt out of the pooling, which is not trained. Give --query-prompt ''")
    tokens = tuple(_length(given, spec) for given in (stage.query_tokens, stage.passage_tokens))
    return FinetunePlan(of, stage, by_dataset, spec, None, prompts, (tokens[0], tokens[1]))


def _stage(config: FinetuneConfig) -> Stage:
    """The command's numbers over the recipe's over DEFAULTS."""
    published = recipes.stage(config.recipe)[1] if config.recipe else DEFAULTS
    found: dict[str, Any] = {}
    for each in fields(Stage):
        said = [getattr(config, each.name, None), getattr(published, each.name), getattr(DEFAULTS, each.name)]
        found[each.name] = next((value for value in said if value not in (None, ())), said[-1])
    found["matryoshka"] = _dims(config, published)
    found["gradient_checkpointing"] = config.gradient_checkpointing or published.gradient_checkpointing
    return Stage(**found)


def _check_numbers(config: FinetuneConfig, stage: Stage) -> None:
    """Raises UsageError for numbers with which nothing could be trained."""
    bounds = {"learning_rate": (0.0, 10.0), "warmup": (0.0, 1.0), "weight_decay": (0.0, 10.0)}
    values = {name: getattr(stage, name) for name in bounds} | {"clip": config.clip}
    for name, value in values.items():
        least, most = bounds.get(name, (0.0, float("inf")))
        if not least <= value <= most or (value == 0 and name in ("learning_rate", "clip")):
            raise UsageError(
                f"--{name.replace('_', '-')} {value} is out of range: give a number over {least:g} and up to {most:g}"
            )


def _refuse_unused(of: str, config: FinetuneConfig, stage: Stage) -> None:
    """Raises UsageError for an option that this kind of training would not look at."""
    unused = {
        EMBEDDING: (),
        RERANKING: ("query_prompt", "passage_prompt", "pooling", "query_tokens"),
        TEXT: ("query_prompt", "passage_prompt", "query_tokens", "group", "lora_rank"),
    }
    given = [name for name in unused[of] if getattr(config, name) is not None]
    lora = [name for name in ("lora_targets", "lora_alpha") if getattr(config, name) is not None]
    given += [] if stage.lora_rank else lora
    given += ["evaluate_steps"] if config.evaluate_steps and not config.evaluate_on else []
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UsageError(
            f"{option} has no meaning here, where the loss is of {of} and nothing asks for it. Leave it out"
        )


def _dims(config: FinetuneConfig, stage: Stage) -> tuple[int, ...]:
    try:
        return tuple(int(dim) for dim in config.matryoshka) or stage.matryoshka
    except ValueError as error:
        raise UsageError(
            f"--matryoshka {','.join(config.matryoshka)}: give numbers by commas, as 64,128,256"
        ) from error


def _losses(config: FinetuneConfig, stage: Stage) -> Mapping[str, Any]:
    """By dataset; "" for all others. Raises UsageError."""
    found = {"": losses.parse(stage.loss)}
    for text in stage.dataset_loss:
        name, equals, loss = text.partition("=")
        if not equals:
            raise UsageError(f"--dataset-loss {text!r} is not NAME=LOSS, as sts=cosent:temperature=0.05")
        found[name] = losses.parse((loss,))
    kinds = sorted({loss.kind for loss in found.values()})
    if len(kinds) > 1:
        raise UsageError(f"the losses are of {' and '.join(kinds)}. A model is trained with losses of one kind")
    if stage.matryoshka and kinds != [EMBEDDING]:
        raise UsageError(f"--matryoshka is of vectors, and the loss is of {kinds[0]}. Leave one of them out")
    if config.learn_temperature and kinds != [EMBEDDING]:
        raise UsageError(f"--learn-temperature is of losses of vectors, and this one is of {kinds[0]}. Leave it out")
    dims = stage.matryoshka
    unified = any(isinstance(each, M3Unified) for loss in found.values() for each in getattr(loss, "losses", (loss,)))
    if unified and (dims or len(found) > 1 or not isinstance(found[""], M3Unified)):
        raise UsageError("m3-unified goes with no other loss and with no --matryoshka. Leave the others out")
    if not dims:
        return found
    return {name: Matryoshka(loss, dims, (1.0 / len(dims),) * len(dims)) for name, loss in found.items()}


def recipe_of(config: FinetuneConfig) -> str | None:
    """The recipe that the stage is in, which fixes how its model is used."""
    return recipes.stage(config.recipe)[0] if config.recipe else None


def _refuse_other_kind(of: str, recipe: Any, config: FinetuneConfig) -> None:
    kinds = {EMBEDDING: Recipe, TEXT: Recipe, RERANKING: RerankRecipe}
    if recipe is not None and not isinstance(recipe, kinds[of]):
        raise UsageError(
            f"--loss is of {of}, and --recipe {config.recipe} trains another kind of model. Losses: "
            f"{', '.join(losses.names())}"
        )


def _encoder(config: FinetuneConfig, stage: Stage, model: str) -> tuple[ModelSpec, tuple[str, str]]:
    """The model as it will be used, and the prompts of queries and passages."""
    encoding = resolve_encoder(ModelOptions(model=model, recipe=recipe_of(config), pooling=config.pooling))
    spec = encoding.spec
    wrong = [dim for dim in stage.matryoshka if not 1 <= dim <= spec.dim]
    if wrong:
        raise UsageError(f"--matryoshka {wrong}: the vectors of {model} have {spec.dim} dimensions. Give no more")
    query = encoding.prompts.get(QUERY, "") if stage.query_prompt is None else stage.query_prompt
    known = next((encoding.prompts[name] for name in PASSAGE_NAMES if name in encoding.prompts), "")
    passage = known if stage.passage_prompt is None else stage.passage_prompt
    return spec, (query, passage)


def _length(asked: int | None, spec: ModelSpec) -> int:
    if asked is not None and asked > spec.max_tokens:
        raise UsageError(f"{asked} tokens a text, but {spec.name} takes {spec.max_tokens}. Ask for no more")
    return asked or min(LENGTH, spec.max_tokens)

"""Published systems, one file each, looked up by the file's name: everything that a model card fixes.

A recipe module has a docstring (sources, licence, what was verified) and `RECIPE`, a Recipe or RerankRecipe. A value that
no source gives is None, never a guess.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UsageError

PASSAGE, QUERY = "passage", "query"  # the prompts of a corpus and of its queries
PASSAGE_NAMES = (PASSAGE, "document", "corpus")  # names of a passage prompt in model directories


RETRIEVAL = tuple(f"{name}Retrieval" for name in ("T2", "MMarco", "Du", "Covid", "Cmedqa", "Ecom", "Medical", "Video"))
RERANKING = ("T2Reranking", "MMarcoReranking", "CMedQAv1-reranking", "CMedQAv2-reranking")


def c_mteb(retrieval: Sequence[float] = (), reranking: Sequence[float] = ()) -> dict[str, float]:
    """Scores by task: those of all tasks of RETRIEVAL, in its order, and of RERANKING."""
    of_kinds = ((RETRIEVAL, retrieval), (RERANKING, reranking))
    return {task: score for kind, scores in of_kinds if scores for task, score in zip(kind, scores, strict=True)}


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """One stage of a system's training: every published number, and our choice where there is none.

    name: value of `--recipe` of the training. start: hub id of its first weights; None where --model must name them.
    loss, dataset_loss: in the syntax of losses.parse, the second ones as NAME=LOSS. batch: rows a step, all devices
    together. group: passages a query, one of them positive. Lengths are in tokens. warmup: a share of all steps.
    precision: of the published run; Shoal trains in bfloat16 or float32. chosen: the fields whose value is our choice,
    since no source gives it.
    """

    name: str
    loss: tuple[str, ...]
    start: str | None = None
    dataset_loss: tuple[str, ...] = ()
    matryoshka: tuple[int, ...] = ()
    batch: int
    group: int = 1
    epochs: int = 1
    query_tokens: int | None = None
    passage_tokens: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    learning_rate: float
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.01
    beta2: float = 0.999
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_targets: str | None = None
    precision: str | None = None
    chosen: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The values that a published system fixes. None leaves the value of the model's own files.

    models: hub ids that the recipe is for, the usual one first. prompts: by name; "passage" is put before a corpus, "query"
    before queries, others are chosen by --prompt-name. passage_template: a passage made of several columns.
    scores: by model and task of evaluation/tasks, in percent: NDCG@10 of a retrieval task, MAP of a reranking task, from their
    authors or from mteb's results repository.
    """

    models: tuple[str, ...] = ()
    pooling: str | None = None
    normalize: bool | None = None
    max_tokens: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    passage_template: str | None = None
    bidirectional: bool | None = None
    append_eos: bool | None = None
    training: tuple[TrainingStage, ...] = ()
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RerankRecipe:
    """The values that a published reranker fixes.

    segments: a decoder's prompt, stretches tokenised one by one, with {instruction}, {query} and {passage} in them; empty
    for an encoder, whose tokenizer joins the pair. answers: the tokens whose logit, or difference of logits, is the
    score; empty for a classifier. activation: "none" | "sigmoid", as published; None leaves the value of the files. beyond:
    texts whose tokens a pair may have on top of max_tokens, as some implementations count. scores: as in Recipe.
    """

    models: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    instruction: str = ""
    answers: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()
    activation: Literal["none", "sigmoid"] | None = None
    max_tokens: int | None = None
    training: tuple[TrainingStage, ...] = ()
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def names(kind: type | None = None) -> list[str]:
    """Names of all recipes, or of those of one kind: Recipe or RerankRecipe."""
    files = sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
    return [name for name in files if kind is None or isinstance(_load(name), kind)]


def stages() -> dict[str, str]:
    """Names of all stages of training, each with the name of its recipe."""
    return {stage.name: name for name in names() for stage in _load(name).training}


def stage(name: str) -> tuple[str, TrainingStage]:
    """The name of a stage's recipe, and the stage. Raises UsageError that names all stages."""
    known = stages()
    if name not in known:
        raise UsageError(f"no training recipe {name!r}. There are {', '.join(known)}")
    return known[name], next(stage for stage in _load(known[name]).training if stage.name == name)


def load(name: str) -> Recipe | RerankRecipe:
    """The recipe `NAME`, of the file `NAME.py` (dashes or underscores). Raises UsageError that names all recipes."""
    if name.replace("_", "-") not in names():
        raise UsageError(f"no recipe {name!r}. Recipes: {', '.join(names())}")
    return _load(name)


def _load(name: str) -> Recipe | RerankRecipe:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").RECIPE

"""Which model encodes, with which prompt: what the command says, over the recipe, over the model's own files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .. import recipes
from ..errors import UsageError
from ..recipes import PASSAGE, Recipe, RerankRecipe
from .spec import ModelSpec, read_spec

Pooling = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """The model, and what may be set over its own files."""

    model: str | None = field(
        default=None, metadata={"help": "sentence-transformers or transformers directory, or hub id."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": f"Published system: {', '.join(recipes.names(Recipe))}."}
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens a text is cut to, special ones counted. Default: the model's.", "min": 1},
    )
    truncate_dim: int | None = field(
        default=None, metadata={"help": "Keep the first N dimensions (Matryoshka models), normalised again.", "min": 1}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Arithmetic. auto: bfloat16 where the chip has it."}
    )
    pooling: Pooling | None = field(default=None, metadata={"help": "Pooling. Default: the model's, else mean."})


@dataclass(frozen=True, kw_only=True)
class ModelOptions(EncoderOptions):
    """The model, and the prompt of its texts."""

    prompt: str | None = field(default=None, metadata={"help": "Text put before every text."})
    prompt_name: str | None = field(
        default=None,
        metadata={"help": "Name of a prompt of the recipe or the model, as 'query'. A recipe's default: 'passage'."},
    )


@dataclass(frozen=True)
class ResolvedEncoder:
    """The decision: the model's files read, the prompt, and the recipe's template if the command gave none. prompts: all
    that can be asked for by name."""

    spec: ModelSpec
    prompt: str
    text_template: str | None
    prompts: Mapping[str, str]


def resolve_encoder(options: ModelOptions) -> ResolvedEncoder:
    """Read the model's files, without torch. Raises UsageError or ModelError, within seconds, for what cannot be."""
    recipe = recipes.load(options.recipe) if options.recipe else None
    if isinstance(recipe, RerankRecipe):
        raise UsageError(f"--recipe {options.recipe} scores pairs: python jobs/rerank_pairs.py")
    if recipe is None and options.model is None:
        raise UsageError("no --model. Give a directory or hub id, as --model BAAI/bge-m3, or a --recipe")
    known = recipe or Recipe(models=(options.model or "",))
    spec = read_spec(
        options.model or known.models[0],
        pooling=options.pooling or known.pooling,
        normalize=known.normalize,
        max_tokens=options.max_tokens or known.max_tokens,
        truncate_dim=options.truncate_dim,
        bidirectional=known.bidirectional,
        append_eos=known.append_eos,
    )
    of_passages = options.prompt_name in (None, PASSAGE)
    prompts = spec.prompts | dict(known.prompts)
    prompt = _prompt(options, prompts, PASSAGE if recipe else spec.default_prompt_name)
    return ResolvedEncoder(spec, prompt, known.passage_template if of_passages else None, prompts)


def prompt_of(encoding: ResolvedEncoder, requested: str | None, names: Sequence[str]) -> str:
    """The prompt of the command, else the first of `names` that recipe or model have, else their default."""
    if requested is not None:
        return requested
    return next((encoding.prompts[name] for name in names if name in encoding.prompts), encoding.prompt)


def _prompt(options: ModelOptions, prompts: Mapping[str, str], default: str | None) -> str:
    if options.prompt is not None and options.prompt_name is not None:
        raise UsageError("--prompt and --prompt-name exclude each other")
    if options.prompt is not None:
        return options.prompt
    name = options.prompt_name or default
    if name is not None and name in prompts:
        return prompts[name]
    if options.prompt_name is None:
        return ""
    raise UsageError(f"no prompt {name!r}. The prompts here: {', '.join(prompts) or 'none'}. Or give --prompt TEXT")

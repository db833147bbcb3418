"""Which model encodes, with which prompt: what the command says, over the recipe, over the model's own files."""

from dataclasses import dataclass, field
from typing import Literal

from . import recipes
from .errors import UsageError
from .models import ModelSpec, read_spec

Pooling = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and what may be set over its own files."""

    model: str | None = field(
        default=None, metadata={"help": "sentence-transformers or transformers directory, or hub id."}
    )
    recipe: str | None = field(default=None, metadata={"help": f"Published system: {', '.join(recipes.names())}."})
    prompt: str | None = field(default=None, metadata={"help": "Text put before every text."})
    prompt_name: str | None = field(default=None, metadata={"help": "Name of one of the model's own prompts."})
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


@dataclass(frozen=True)
class Encoding:
    """The decision: the model's files read, the prompt, and the recipe's template if the command gave none."""

    spec: ModelSpec
    prompt: str
    text_template: str | None


def resolve(options: ModelOptions) -> Encoding:
    """Read the model's files, without torch. Raises UsageError or ModelError, within seconds, for what cannot be."""
    recipe = recipes.load(options.recipe) if options.recipe else None
    model = options.model or (recipe.model if recipe else None)
    if model is None:
        raise UsageError("no --model. Give a directory or hub id, as --model BAAI/bge-m3, or a --recipe")
    spec = read_spec(
        model,
        pooling=options.pooling or (recipe.pooling if recipe else None),
        max_tokens=options.max_tokens or (recipe.max_tokens if recipe else None),
        truncate_dim=options.truncate_dim,
        bidirectional=recipe.bidirectional if recipe else None,
        append_eos=recipe.append_eos if recipe else None,
    )
    template = recipe.text_template if recipe else None
    return Encoding(spec, _prompt(options, spec, recipe.passage_prompt if recipe else None), template)


def _prompt(options: ModelOptions, spec: ModelSpec, of_recipe: str | None) -> str:
    if options.prompt is not None and options.prompt_name is not None:
        raise UsageError("--prompt and --prompt-name exclude each other")
    if options.prompt is not None:
        return options.prompt
    if options.prompt_name is not None:
        if options.prompt_name not in spec.prompts:
            known = ", ".join(spec.prompts) or "none"
            raise UsageError(
                f"the model has no prompt {options.prompt_name!r}. Its prompts: {known}. Or give --prompt TEXT"
            )
        return spec.prompts[options.prompt_name]
    if of_recipe is not None:
        return of_recipe
    return spec.prompts[spec.default_prompt_name] if spec.default_prompt_name else ""

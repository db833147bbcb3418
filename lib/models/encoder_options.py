"""Options of an encoder and their resolution.

Each value is taken from the command, else from the recipe, else from the model's own files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .. import recipes
from ..cli.options import option
from ..errors import UsageError
from ..recipes import PASSAGE, Recipe, RerankRecipe
from .modules_json import Pooling
from .spec import ModelSpec
from .spec_reader import read_spec


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """The model, and the options that override its own files."""

    model: str | None = option("sentence-transformers or transformers directory, or hub id.", None)
    recipe: str | None = option(f"Published system: {', '.join(recipes.names(Recipe))}.", None)
    max_tokens: int | None = option("Tokens a text is cut to, special ones counted. Default: the model's.", None, min=1)
    truncate_dim: int | None = option("Keep the first N dimensions (Matryoshka models), normalised again.", None, min=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Arithmetic. auto: bfloat16 where the chip has it.", "auto"
    )
    token_budget: int | None = option("Tokens a batch. Default: 1024 on CPUs, by model size on GPUs.", None, min=1)
    pooling: Pooling | None = option("Pooling. Default: the model's, else mean.", None)

    def with_prompt(self, prompt: str | None) -> "ModelOptions":
        """The same encoder, for texts with this prompt; None selects the default one."""
        return ModelOptions(**vars(self), prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(EncoderOptions):
    """The options of an encoder, and the prompt of its texts."""

    prompt: str | None = option("Text put before every text.", None)
    prompt_name: str | None = option(
        "Name of a prompt of the recipe or the model, as 'query'. A recipe's default: 'passage'.", None
    )


@dataclass(frozen=True)
class ResolvedEncoder:
    """An encoder with everything decided: the spec from the model's files, the prompt, and the recipe's template.

    text_template: None where the recipe has none, or the prompt is not the passages'. prompts: all prompts by name.
    """

    spec: ModelSpec
    prompt: str
    text_template: str | None
    prompts: Mapping[str, str]


def resolve_encoder(options: ModelOptions) -> ResolvedEncoder:
    """Read the model's files, without torch. Raises UsageError or ModelError, within seconds, for a wrong option."""
    recipe = recipes.load(options.recipe) if options.recipe else None
    if isinstance(recipe, RerankRecipe):
        raise UsageError(f"--recipe {options.recipe} scores pairs: python jobs/rerank_pairs.py")
    if recipe is None and options.model is None:
        raise UsageError("no --model. Give a directory or hub id, as --model BAAI/bge-m3, or a --recipe")
    published = recipe or Recipe()
    fixed = replace(
        published, pooling=options.pooling or published.pooling, max_tokens=options.max_tokens or published.max_tokens
    )
    spec = read_spec(options.model or published.models[0], fixed, truncate_dim=options.truncate_dim)
    is_passage_prompt = options.prompt_name in (None, PASSAGE)
    prompts = spec.prompts | dict(published.prompts)
    prompt = _prompt(options, prompts, PASSAGE if recipe else spec.default_prompt_name)
    return ResolvedEncoder(spec, prompt, published.passage_template if is_passage_prompt else None, prompts)


def prompt_of(encoder: ResolvedEncoder, requested: str | None, names: Sequence[str]) -> str:
    """Return the requested prompt, else the first of `names` that the recipe or model has, else the default."""
    if requested is not None:
        return requested
    return next((encoder.prompts[name] for name in names if name in encoder.prompts), encoder.prompt)


def _prompt(options: ModelOptions, prompts: Mapping[str, str], default: str | None) -> str:
    """Return the prompt that the options select. default: the name of the prompt without an option."""
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

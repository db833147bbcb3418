"""Options of a reranker and their resolution.

Each value is taken from the command, else from the recipe, else from the model's own files.
"""

from dataclasses import dataclass, replace
from typing import Literal

from .. import recipes
from ..cli.options import option
from ..errors import UsageError
from ..recipes import RerankRecipe
from .reranker_spec import Activation, RerankSpec, read_rerank_spec

INSTRUCTION = "{instruction}"  # its place in the segments of a recipe
RERANKERS = ", ".join(recipes.names(RerankRecipe))


@dataclass(frozen=True, kw_only=True)
class RerankerOptions:
    """The reranker, and the options that override its own files."""

    model: str | None = option("Sequence classifier or CrossEncoder directory, or hub id; others by --recipe.", None)
    recipe: str | None = option(f"Published reranker: {RERANKERS}.", None)
    instruction: str | None = option("The task in words, for models that take one. Default: the recipe's.", None)
    max_tokens: int | None = option(
        "Tokens a pair is cut to, template included. Default: the recipe's or model's.", None, min=8
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Arithmetic. auto: bfloat16 where the chip has it.", "auto"
    )
    token_budget: int | None = option("Tokens a batch. Default: 1024 on CPUs, by model size on GPUs.", None, min=1)
    activation: Activation | None = option(
        "What becomes of the raw score. Default: the recipe's, else the model's.", None
    )


@dataclass(frozen=True, kw_only=True)
class SecondStageOptions:
    """A reranker behind a retriever."""

    reranker: str | None = option("Reranker directory or hub id: ranks what was retrieved, or the candidates.", None)
    reranker_recipe: str | None = option(f"Published reranker: {RERANKERS}.", None)

    @property
    def enabled(self) -> bool:
        """Whether there is a reranker."""
        return bool(self.reranker or self.reranker_recipe)


def resolve_reranker(options: RerankerOptions) -> RerankSpec:
    """Read the model's files, without torch. Raises UsageError or ModelError, within seconds, for a wrong option."""
    recipe = recipes.load(options.recipe) if options.recipe else None
    if recipe is not None and not isinstance(recipe, RerankRecipe):
        raise UsageError(f"--recipe {options.recipe} embeds texts: python jobs/embed_corpus.py")
    if recipe is None and options.model is None:
        raise UsageError("no --model. Give a directory or hub id, as --model BAAI/bge-reranker-v2-m3, or a --recipe")
    published = recipe or RerankRecipe()
    has_instruction = any(INSTRUCTION in segment for segment in published.segments)
    if options.instruction is not None and not has_instruction:
        raise UsageError(f"--instruction: {options.recipe or options.model} takes none. Leave it out")
    instruction = published.instruction if options.instruction is None else options.instruction
    fixed = replace(
        published,
        max_tokens=options.max_tokens or published.max_tokens,
        segments=tuple(segment.replace(INSTRUCTION, instruction) for segment in published.segments),
        activation=options.activation or published.activation,
    )
    return read_rerank_spec(options.model or published.models[0], fixed)

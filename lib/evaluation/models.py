"""The models of an evaluation: an encoder, a reranker, or one after the other."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import ModelError
from ..models.encoder_options import ResolvedEncoder, prompt_of, resolve_encoder
from ..models.files import read_json
from ..models.reranker_options import RerankerOptions, resolve_reranker
from ..models.reranker_spec import RerankSpec
from ..recipes import PASSAGE_NAMES, QUERY
from .config import EvaluateConfig, safe_name
from .tasks import Task

SIMILARITIES = {None: True, "cosine": True, "dot": False}  # sentence-transformers' names -> compare by cosine


@dataclass(frozen=True)
class EvaluatedModels:
    """The models, their files read.

    encoder: None where only a reranker is evaluated. cosine: compare its vectors by cosine, else by inner product.
    """

    name: str
    encoder: ResolvedEncoder | None
    cosine: bool
    reranker: RerankSpec | None

    @property
    def revision(self) -> str:
        specs = [self.encoder.spec if self.encoder else None, self.reranker.model if self.reranker else None]
        return "+".join(spec.revision for spec in specs if spec)


def resolve_models(config: EvaluateConfig) -> EvaluatedModels:
    """Read the models' files. Raises UsageError or ModelError for models that cannot be evaluated."""
    encoder = resolve_encoder(config.model.with_prompt(None)) if config.has_encoder else None
    reranker = resolve_reranker(reranker_options(config)) if config.second_stage.enabled else None
    if reranker:
        reranker.pair_format()  # a wrong tokenizer, or too long a prompt, is refused now
    specs = [spec for spec in (encoder and encoder.spec, reranker and reranker.model) if spec]
    return EvaluatedModels(
        name=safe_name(config.name or "+".join(_short(spec.name) for spec in specs)),
        encoder=encoder,
        cosine=_uses_cosine(encoder) if encoder else True,
        reranker=reranker,
    )


def reranker_options(config: EvaluateConfig) -> RerankerOptions:
    """The reranker of the second stage."""
    return RerankerOptions(
        model=config.second_stage.reranker,
        recipe=config.second_stage.reranker_recipe,
        instruction=config.instruction,
        dtype=config.model.dtype,
        token_budget=config.model.token_budget,
    )


def prompts_of(config: EvaluateConfig, encoder: ResolvedEncoder, task: Task) -> dict[str, str]:
    """The prompts of a task's passages and queries."""
    return {
        "passages": prompt_of(encoder, config.passage_prompt, PASSAGE_NAMES),
        "queries": prompt_of(encoder, config.query_prompt, (task.name, QUERY)),
    }


def _short(name: str) -> str:
    """A hub id as it is; the last name of a path."""
    looks_local = name.startswith((".", "/", "~")) or "://" in name or name.count("/") > 1
    return PurePosixPath(name.rstrip("/")).name if looks_local else name


def _uses_cosine(encoder: ResolvedEncoder) -> bool:
    files = read_json(Path(encoder.spec.path) / "config_sentence_transformers.json", {})
    name = files.get("similarity_fn_name")
    if name not in SIMILARITIES:
        raise ModelError(f"{encoder.spec.name} compares vectors by {name!r}. Here: cosine or dot product")
    return SIMILARITIES[name]

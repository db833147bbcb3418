"""What fixes a reranker's scores, read from its files as JSON: neither torch nor transformers is imported here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ModelError
from . import files, modules_json
from .pair_tokenizer import PairFormat, Prompt, TwoSequences
from .spec import ModelSpec, read_spec
from .tokenizer import Tokenizer

Activation = Literal["none", "sigmoid"]
SPEC_FILE = "shoal_reranker.json"  # how pairs go through a model, beside it; see convert
QUERY_SHARE = 0.75  # of the length; FlagEmbedding's


@dataclass(frozen=True)
class RerankSpec:
    """A model directory and how pairs go through it.

    segments: a decoder's prompt, see pairs.Prompt; empty for encoders. answers: tokens as text whose logit is the score,
    the second one's subtracted; empty for a classifier. limit: tokens of a pair. beyond: texts that a pair may have on top
    of the model's length, which are counted in it.
    """

    model: ModelSpec
    segments: tuple[str, ...]
    answers: tuple[str, ...]
    activation: Activation
    limit: int
    beyond: tuple[str, ...] = ()

    def pair_format(self) -> PairFormat:
        """The tokenising half of the reranker (CPU stage). Raises ModelError for lengths that leave no room."""
        tokenizer = Tokenizer(self.model)
        if self.segments:
            return Prompt(tokenizer, self.segments, self.limit, int(self.model.max_tokens * QUERY_SHARE))
        return TwoSequences(tokenizer, QUERY_SHARE)


def read_rerank_spec(
    model: str,
    *,
    revision: str | None = None,
    max_tokens: int | None = None,
    segments: tuple[str, ...] = (),
    answers: tuple[str, ...] = (),
    beyond: tuple[str, ...] = (),
    activation: Activation | None = None,
) -> RerankSpec:
    """Read a sequence classifier, a CrossEncoder directory, or, with segments and answers, a causal language model.

    Without `activation`, what sentence-transformers' CrossEncoder applies: what the files name, else a sigmoid. Pairs are
    cut as FlagEmbedding does (the passage, and a query over QUERY_SHARE), where CrossEncoder cuts the longer side, and
    texts are stripped. beyond: texts whose tokens a pair may have on top of max_tokens. Raises ModelError for a model
    that is no reranker without a recipe.
    """
    root = files.locate(model, revision)
    own = files.read_json(root / SPEC_FILE, {})  # of a converted model
    segments = tuple(own.get("segments", segments))
    beyond, activation = tuple(own.get("beyond", beyond)), activation or own.get("activation")
    max_tokens = max_tokens or own.get("max_tokens")
    if _is_classifier(root):
        answers = ()  # a language model that was turned into one: its head is the difference of the answers already
    elif not answers:
        _refuse(model, root)
    parts = modules_json.StModules() if answers else modules_json.read_reranker(root)
    config = files.read_json(root / parts.subfolder / "config.json")
    spec = read_spec(model, revision=revision, pooling="cls", normalize=False, max_tokens=max_tokens, parts=parts)
    more = sum(map(len, Tokenizer(spec).contents(beyond))) if beyond else 0
    chosen = activation or _activation(config, root)
    return RerankSpec(spec, segments, answers, chosen, spec.max_tokens + more, beyond)


def _is_classifier(root: Path) -> bool:
    """Whether the files name a sequence classifier; a CrossEncoder directory may keep them in a folder of its own."""
    config = files.read_json(root / "config.json", {})
    names = config.get("architectures") or []
    return bool(names) and names[0].endswith("ForSequenceClassification")


def _refuse(model: str, root: Path) -> None:
    config = files.read_json(root / "config.json", {})
    if config:
        architecture = (config.get("architectures") or ["an unnamed architecture"])[0]
        raise ModelError(
            f"{model} is {architecture}, not a sequence classifier: how it scores a pair is not in its files. Give the "
            "--recipe that it belongs to."
        )


def _activation(config: dict, root: Path) -> Activation:
    """As sentence-transformers 6.2 looks for it: its own file, then config.json's two places, the newer one first."""
    named = (
        files.read_json(root / "config_sentence_transformers.json", {}).get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "torch.nn.Sigmoid"
    )
    kind = named.rsplit(".", 1)[-1]
    if kind == "Identity":
        return "none"
    if kind == "Sigmoid":
        return "sigmoid"
    raise ModelError(
        f"{root} names the activation {named!r}. Shoal applies Sigmoid or Identity: choose by --activation"
    )

"""RerankSpec: everything that decides a reranker's scores, read from its files. Imports neither torch nor transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ModelError
from . import files, modules_json
from .pair_tokenizer import PairFormat, Prompt, TwoSequences
from .spec import ModelSpec
from .spec_reader import SpecOverrides, read_spec
from .tokenizer import Tokenizer

Activation = Literal["none", "sigmoid"]
SPEC_FILE = "shoal_reranker.json"  # written beside a converted model: its segments, activation and lengths
QUERY_SHARE = 0.75  # largest share of the length for a query; the value of FlagEmbedding


@dataclass(frozen=True)
class RerankSpec:
    """A model directory and the format of its pairs.

    segments: the prompt of a decoder, see pair_tokenizer.Prompt; empty for encoders. answers: texts of one token; the score
    is the logit of the first minus that of the second; empty for a classifier. limit: tokens of a pair. beyond: texts that
    a pair may have on top of the model's length; `limit` includes them.
    """

    model: ModelSpec
    segments: tuple[str, ...]
    answers: tuple[str, ...]
    activation: Activation
    limit: int
    beyond: tuple[str, ...] = ()

    def pair_format(self) -> PairFormat:
        """Build the tokenising half of the reranker (CPU stage). Raises ModelError for lengths that leave no room."""
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

    The default activation is that of sentence-transformers' CrossEncoder: the one that the files name, else a sigmoid.
    Pairs are cut as FlagEmbedding does (the passage, and a query over QUERY_SHARE); CrossEncoder cuts the longer side.
    beyond: texts whose tokens a pair may have on top of max_tokens. Raises ModelError for a model that needs a recipe.
    """
    root = files.locate(model, revision)
    converted = files.read_json(root / SPEC_FILE, {})
    segments = tuple(converted.get("segments", segments))
    beyond, activation = tuple(converted.get("beyond", beyond)), activation or converted.get("activation")
    max_tokens = max_tokens or converted.get("max_tokens")
    if _is_classifier(root):
        answers = ()  # a language model converted to a classifier has the difference of the answers as its head
    elif not answers:
        _refuse_unknown(model, root)
    modules = modules_json.StModules() if answers else modules_json.read_reranker(root)
    config = files.read_json(root / modules.subfolder / "config.json")
    overrides = SpecOverrides(pooling="cls", normalize=False, max_tokens=max_tokens)
    spec = read_spec(model, overrides, revision=revision, modules=modules)
    extra = sum(map(len, Tokenizer(spec).contents(beyond))) if beyond else 0
    resolved_activation = activation or _activation(config, root)
    return RerankSpec(spec, segments, answers, resolved_activation, spec.max_tokens + extra, beyond)


def _is_classifier(root: Path) -> bool:
    """Return whether the files name a sequence classifier. A CrossEncoder may have them in a subfolder: then False."""
    config = files.read_json(root / "config.json", {})
    names = config.get("architectures") or []
    return bool(names) and names[0].endswith("ForSequenceClassification")


def _refuse_unknown(model: str, root: Path) -> None:
    """Raise ModelError for a plain model that is not a classifier."""
    config = files.read_json(root / "config.json", {})
    if config:
        architecture = (config.get("architectures") or ["an unnamed architecture"])[0]
        raise ModelError(
            f"{model} is {architecture}, not a sequence classifier: how it scores a pair is not in its files. Give the "
            "--recipe that it belongs to."
        )


def _activation(config: dict, root: Path) -> Activation:
    """Read the activation in the order of sentence-transformers 6.2: its own file, then two keys of config.json."""
    name = (
        files.read_json(root / "config_sentence_transformers.json", {}).get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "torch.nn.Sigmoid"
    )
    kind = name.rsplit(".", 1)[-1]
    if kind == "Identity":
        return "none"
    if kind == "Sigmoid":
        return "sigmoid"
    raise ModelError(f"{root} names the activation {name!r}. Shoal applies Sigmoid or Identity: choose by --activation")

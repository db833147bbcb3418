"""RerankSpec: everything that decides a reranker's scores, read from its files. Imports neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError
from ..recipes import Recipe, RerankRecipe
from . import files, modules_json
from .pair_tokenizer import PairFormat, Prompt, TwoSequences
from .spec import ModelSpec, on_this_machine
from .spec_reader import read_spec
from .tokenizer import Tokenizer

Activation = Literal["none", "sigmoid"]
SPEC_FILE = "shoal_reranker.json"  # written beside a converted model: its segments, activation and lengths
QUERY_SHARE = 0.75  # largest share of the length for a query; the value of FlagEmbedding
NOTHING_FIXED = RerankRecipe()


@dataclass(frozen=True)
class RerankSpec:
    """A model directory and the format of its pairs.

    segments: the prompt of a decoder, see pair_tokenizer.Prompt; empty for encoders. answers: texts of one token; the score
    is the logit of the first minus that of the second; empty for a classifier. limit: tokens of a pair. beyond: texts that
    a pair may have on top of the model's length; `limit` includes them. query_prompt: before every query of an encoder.
    """

    model: ModelSpec
    segments: tuple[str, ...]
    answers: tuple[str, ...]
    activation: Activation
    limit: int
    beyond: tuple[str, ...] = ()
    query_prompt: str = ""

    def on_this_machine(self) -> "RerankSpec":
        """Return the spec with the path of the files on this node: see spec.on_this_machine."""
        return replace(self, model=on_this_machine(self.model))

    def pair_format(self) -> PairFormat:
        """Build the tokenising half of the reranker (CPU stage). Raises ModelError for lengths that leave no room."""
        tokenizer = Tokenizer(self.model)
        if self.segments:
            return Prompt(tokenizer, self.segments, self.limit, int(self.model.max_tokens * QUERY_SHARE))
        return TwoSequences(tokenizer, QUERY_SHARE, self.query_prompt)


def read_rerank_spec(model: str, fixed: RerankRecipe = NOTHING_FIXED) -> RerankSpec:
    """Read a sequence classifier, a CrossEncoder directory, or, with segments and answers, a causal language model.

    The default activation is that of sentence-transformers' CrossEncoder: the one that the files name, else a sigmoid.
    Pairs are cut as FlagEmbedding does (the passage, and a query over QUERY_SHARE); CrossEncoder cuts the longer side.
    Raises ModelError for a model that needs a recipe.
    """
    root = files.locate(model)
    converted = files.read_json(root / SPEC_FILE, {})
    segments, beyond = (tuple(converted.get(name, getattr(fixed, name))) for name in ("segments", "beyond"))
    answers = fixed.answers
    plain = files.read_json(root / "config.json", {})  # a CrossEncoder may have it in a subfolder
    architecture = (plain.get("architectures") or ["an unnamed architecture"])[0]
    if architecture.endswith("ForSequenceClassification"):
        answers = ()  # a language model converted to a classifier has the difference of the answers as its head
    elif plain and not answers:
        raise ModelError(
            f"{model} is {architecture}, not a sequence classifier: how it scores a pair is not in its files. Give the "
            "--recipe that it belongs to."
        )
    modules = modules_json.StModules() if answers else modules_json.read_reranker(root)
    config = files.read_json(root / modules.subfolder / "config.json")
    if not answers:
        _check_labels(config, model)
    max_tokens = fixed.max_tokens or converted.get("max_tokens")
    spec = read_spec(model, Recipe(pooling="cls", normalize=False, max_tokens=max_tokens), modules=modules)
    extra = sum(map(len, Tokenizer(spec).contents(beyond))) if beyond else 0
    activation = fixed.activation or converted.get("activation") or _activation(config, root)
    prompt = "" if segments else _query_prompt(root)
    return RerankSpec(spec, segments, answers, activation, spec.max_tokens + extra, beyond, prompt)


def _check_labels(config: Mapping[str, Any], model: str) -> None:
    """Raise ModelError for a classifier that gives a pair several numbers. transformers gives two where nothing is said."""
    labels = config.get("num_labels") or len(config.get("id2label") or "01")
    if labels != 1:
        raise ModelError(f"{model} gives {labels} labels a pair; a reranker gives one. Choose a model with one label.")


def _query_prompt(root: Path) -> str:
    """Read the prompt that CrossEncoder puts before every query: the default one of a directory that has modules.json."""
    if not (root / "modules.json").is_file():
        return ""
    content = files.read_json(root / "config_sentence_transformers.json", {})
    name, prompts = content.get("default_prompt_name"), content.get("prompts") or {}
    if name is not None and name not in prompts:
        raise ModelError(
            f"{root} names the default prompt {name!r}, and has the prompts {', '.join(prompts) or 'none'}."
        )
    return prompts[name] or "" if name is not None else ""


def _activation(config: dict, root: Path) -> Activation:
    """Read the activation in the order of sentence-transformers 6.2: its own file, then two keys of config.json."""
    name = (
        files.read_json(root / "config_sentence_transformers.json", {}).get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "torch.nn.Sigmoid"
    )
    known: dict[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid"}
    if (kind := name.rsplit(".", 1)[-1]) in known:
        return known[kind]
    raise ModelError(f"{root} names the activation {name!r}. Shoal applies Sigmoid or Identity: choose by --activation")

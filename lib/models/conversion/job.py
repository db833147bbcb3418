"""Convert: a reranker that brings its own code as a plain classifier, written only if both score alike."""

import json
import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import recipes
from ...errors import ModelError, UsageError
from ...recipes import RerankRecipe
from ..files import read_json
from ..spec import Tokens

log = logging.getLogger("shoal")

TOLERANCE = 1e-2  # of a score, between the brought code and the converted network, both in float32
SCRIPT = Path(__file__).with_name("original_scores.py")
WORDS = (
    "糖尿病患者应该怎样控制饮食",
    "how does a reranker differ from an embedding model",
    "北京到上海的高铁需要多长时间",
    "what is the capital of France",
    "手机屏幕碎了怎么办",
    "when did the second world war end",
    "向量数据库 with 1,000,000,000 rows",
    "the quick brown fox jumps over the lazy dog",
    "今天天气很好，适合出去散步。",
    "Paris is the capital and largest city of France, on the river Seine.",
)

PAIRS = [(query, passage * repeats) for repeats in (1, 12) for query in WORDS for passage in WORDS[5:]]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Everything `jobs/convert_reranker.py` can be told."""

    model: str = field(
        metadata={"help": "Directory of the original: 360Zhinao-1.8B-Reranking or bge's layerwise reranker."}
    )
    output: str = field(metadata={"help": "Directory to write; it must not be there yet."})
    reference_python: str = field(
        metadata={"help": "Interpreter of the environment that may run the original's own code (torch, transformers)."}
    )
    layer: int | None = field(
        default=None, metadata={"help": "Layer whose head is used, of a layerwise reranker.", "min": 1}
    )


def convert(config: ConvertConfig) -> float:
    """Write the converted reranker; the largest difference of a score. Raises ModelError when it is over TOLERANCE."""
    source, target = Path(config.model), Path(config.output)
    if target.exists():
        raise UsageError(f"--output {target} is there already. Choose another, or remove it")
    kind = _kind(read_json(source / "config.json"), source)
    _check_layer(config, kind)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".convert-") as name:
        folder = Path(name)
        log.info(f"scoring {len(PAIRS)} pairs by the code of {source}")
        original = _original(config, kind, folder)
        log.info("converting")
        segments, error = _converted(config, kind, original, folder)
        (folder / "made").rename(target)
    log.info(f"{target}: scores differ by {error:.1e} at most; the score is read after {segments[-1]!r}")
    return error


def _kind(config: dict[str, Any], source: Path) -> str:
    if config.get("model_type") == "zhinao":
        return "zhinao"
    if "start_layer" in config and "scale_depth" in config:
        return "minicpm"
    raise ModelError(f"{source} is {config.get('model_type')!r}: neither 360Zhinao nor a layerwise MiniCPM reranker")


def _check_layer(config: ConvertConfig, kind: str) -> None:
    if (kind == "minicpm") != (config.layer is not None):
        raise UsageError("--layer belongs to a layerwise reranker, and it needs one, as --layer 28")
    if config.layer is not None:
        shape = read_json(Path(config.model) / "config.json")
        first, last = shape["start_layer"], shape["num_hidden_layers"]
        if not first <= config.layer <= last:
            raise UsageError(f"--layer {config.layer} has no head: choose {first} to {last}")


def _original(config: ConvertConfig, kind: str, folder: Path) -> dict[str, Any]:
    """What the brought code makes of the pairs: see original_scores."""
    given, found = folder / "pairs.json", folder / "found.json"
    given.write_text(json.dumps(PAIRS))
    more = [] if config.layer is None else [str(config.layer)]
    line = [config.reference_python, str(SCRIPT), kind, config.model, str(given), str(found), *more]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"--reference-python {config.reference_python} cannot be run: {error}") from error
    if done.returncode:
        raise ModelError(f"the original's code did not run with {config.reference_python}: {done.stderr[-1500:]}")
    return json.loads(found.read_text())


def _converted(
    config: ConvertConfig, kind: str, original: dict[str, Any], folder: Path
) -> tuple[tuple[str, ...], float]:
    """Write `folder/made`. The template up to the token that the score is read at, which is found out, and the error."""
    from . import weights as weights

    source, tokenizer = Path(config.model), Path(config.model)
    if original["tiktoken"] is not None:
        weights.write_tokenizer(tokenizer := folder / "tokenizer", original["tiktoken"])
    loaded, shape = weights.read_weights(source), read_json(source / "config.json")
    if kind == "zhinao":
        found, recipe = weights.from_zhinao(shape, loaded), recipes.load("zhinao-reranker")
    else:
        found, recipe = weights.from_minicpm(shape, loaded, config.layer or 0), recipes.load("bge-reranker-layerwise")
    assert isinstance(recipe, RerankRecipe)
    errors: list[float] = []
    for segments in _endings(recipe, kind):
        shutil.rmtree(folder / "made", ignore_errors=True)
        about = {"segments": segments, "beyond": recipe.beyond, "activation": recipe.activation}
        weights.write(tokenizer, folder / "made", *found, about | {"max_tokens": recipe.max_tokens})
        errors.append(_difference(folder / "made", original))
        if errors[-1] <= TOLERANCE:
            return segments, errors[-1]
    raise ModelError(
        f"the converted network differs by {min(errors):.2g} at best, allowed {TOLERANCE}: nothing is written"
    )


def _endings(recipe: RerankRecipe, kind: str) -> list[tuple[str, ...]]:
    """The template cut off after each place behind the passage that the score may be read at, the longest first."""
    after = next(i for i, segment in enumerate(recipe.segments) if segment.endswith("{passage}")) + 1
    ends = range(len(recipe.segments), after, -1) if kind == "zhinao" else [len(recipe.segments)]
    return [recipe.segments[:end] for end in ends]


def _difference(made: Path, original: dict[str, Any]) -> float:
    """The largest difference of a score, in float32. Raises ModelError for a pair whose token ids are not the original's."""
    from ..reranker import Reranker
    from ..reranker_spec import read_rerank_spec

    spec = read_rerank_spec(str(made))
    formatted = spec.pair_format()(*zip(*PAIRS, strict=True))
    for (query, passage), ids, expected in zip(PAIRS, _each(formatted.tokens), original["ids"], strict=True):
        if ids != expected[: len(ids)]:
            place = next(i for i, (one, other) in enumerate(zip(ids, expected, strict=False)) if one != other)
            raise ModelError(
                f"the pair {query!r}, {passage[:40]!r} is tokenised otherwise from token {place} on: nothing is written"
            )
    scores = Reranker(spec, dtype="float32", device="cpu").score(formatted, np.zeros(len(PAIRS), np.int64))
    return float(np.abs(scores - np.array(original["scores"])).max())


def _each(tokens: Tokens) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]

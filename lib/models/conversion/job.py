"""Convert a reranker with model code of its own to a plain classifier, written only if both give the same scores."""

import json
import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import recipes
from ...cli.options import option
from ...errors import ModelError, UsageError
from ...recipes import RerankRecipe
from ..files import read_json

log = logging.getLogger("shoal")

TOLERANCE = 1e-2  # largest difference of a score between the original and the converted network, both in float32
RECIPES = {"zhinao": "zhinao-reranker", "minicpm": "bge-reranker-layerwise"}
SCRIPT = Path(__file__).with_name("original_scores.py")
TEXTS = (
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

# Each of TEXTS with short and long passages, so that the tests of token ids cover truncation too.
PAIRS = [(query, passage * repeats) for repeats in (1, 12) for query in TEXTS for passage in TEXTS[5:]]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `jobs/convert_reranker.py`."""

    model: str = option("Directory of the original: 360Zhinao-1.8B-Reranking or bge's layerwise reranker.")
    output: str = option("Directory to write; it must not exist yet.")
    reference_python: str = option(
        "Interpreter of the environment that may run the original's own code (torch, transformers)."
    )
    layer: int | None = option("Layer whose head is used, of a layerwise reranker.", None, min=1)


def convert(config: ConvertConfig) -> float:
    """Write the converted reranker; return the largest difference of a score. Raises ModelError when it is over TOLERANCE."""
    source, target = Path(config.model), Path(config.output)
    if target.exists():
        raise UsageError(f"--output {target} exists already. Choose another, or remove it")
    source_type = _source_type(config, read_json(source / "config.json"))
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".convert-") as name:
        folder = Path(name)
        log.info(f"scoring {len(PAIRS)} pairs by the code of {source}")
        original = _original_scores(config, source_type, folder)
        log.info("converting")
        segments, error = _convert_and_verify(config, source_type, original, folder)
        (folder / "converted").rename(target)
    log.info(f"{target}: scores differ by {error:.1e} at most; the score is read after {segments[-1]!r}")
    return error


def _source_type(config: ConvertConfig, shape: dict[str, Any]) -> str:
    """Return "zhinao" or "minicpm". Raises ModelError for another model, UsageError for a --layer that does not fit it."""
    layerwise = shape.get("model_type") != "zhinao"
    if layerwise and not {"start_layer", "scale_depth"} <= shape.keys():
        raise ModelError(
            f"{config.model} is {shape.get('model_type')!r}: neither 360Zhinao nor a layerwise MiniCPM reranker"
        )
    if layerwise != (config.layer is not None):
        raise UsageError("--layer belongs to a layerwise reranker, and it needs one, as --layer 28")
    if config.layer is not None and not shape["start_layer"] <= config.layer <= shape["num_hidden_layers"]:
        choices = f"{shape['start_layer']} to {shape['num_hidden_layers']}"
        raise UsageError(f"--layer {config.layer} has no head: choose {choices}")
    return "minicpm" if layerwise else "zhinao"


def _original_scores(config: ConvertConfig, source_type: str, folder: Path) -> dict[str, Any]:
    """Score the pairs by the checkpoint's own code, in another interpreter; see original_scores.py."""
    pairs_file, scores_file = folder / "pairs.json", folder / "scores.json"
    pairs_file.write_text(json.dumps(PAIRS))
    layer = [] if config.layer is None else [str(config.layer)]
    arguments = [source_type, config.model, str(pairs_file), str(scores_file), *layer]
    try:
        process = subprocess.run(
            [config.reference_python, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UsageError(f"--reference-python {config.reference_python} cannot be run: {error}") from error
    if process.returncode:
        raise ModelError(f"the original's code did not run with {config.reference_python}: {process.stderr[-1500:]}")
    return json.loads(scores_file.read_text())


def _convert_and_verify(
    config: ConvertConfig, source_type: str, original: dict[str, Any], folder: Path
) -> tuple[tuple[str, ...], float]:
    """Write `folder/converted`; return the template that gives the original's scores, and the largest difference.

    Each ending of the template is tried until one is within TOLERANCE. Raises ModelError when none is.
    """
    from ..load import read_weights
    from . import weights

    source = tokenizer = Path(config.model)
    if original["tiktoken"] is not None:
        tokenizer = folder / "tokenizer"
        weights.write_tokenizer(tokenizer, original["tiktoken"])
    tensors, shape = read_weights(source), read_json(source / "config.json")
    recipe = recipes.load(RECIPES[source_type])
    assert isinstance(recipe, RerankRecipe)
    if source_type == "zhinao":
        network = weights.from_zhinao(shape, tensors)
    else:
        network = weights.from_minicpm(shape, tensors, config.layer or 0)
    errors: list[float] = []
    for segments in _template_endings(recipe, source_type):
        shutil.rmtree(folder / "converted", ignore_errors=True)
        pair_format = {"segments": segments, "beyond": recipe.beyond, "activation": recipe.activation}
        weights.write(tokenizer, folder / "converted", *network, pair_format | {"max_tokens": recipe.max_tokens})
        errors.append(_largest_difference(folder / "converted", original))
        if errors[-1] <= TOLERANCE:
            return segments, errors[-1]
    raise ModelError(
        f"the converted network differs by {min(errors):.2g} at best, allowed {TOLERANCE}: nothing is written"
    )


def _template_endings(recipe: RerankRecipe, source_type: str) -> list[tuple[str, ...]]:
    """Cut the template after each segment behind the passage where the score may be read, the longest first."""
    after = next(i for i, segment in enumerate(recipe.segments) if segment.endswith("{passage}")) + 1
    ends = range(len(recipe.segments), after, -1) if source_type == "zhinao" else [len(recipe.segments)]
    return [recipe.segments[:end] for end in ends]


def _largest_difference(folder: Path, original: dict[str, Any]) -> float:
    """Return the largest difference of a score, in float32. Raises ModelError where the token ids of a pair differ."""
    from ..reranker import Reranker
    from ..reranker_spec import read_rerank_spec

    spec = read_rerank_spec(str(folder))
    formatted = spec.pair_format()(*zip(*PAIRS, strict=True))
    ids_of_pairs = np.split(formatted.tokens.ids, formatted.tokens.offsets[1:-1])
    for (query, passage), ids, expected in zip(PAIRS, ids_of_pairs, original["ids"], strict=True):
        if ids.tolist() != expected[: len(ids)]:
            position = next(i for i, (one, other) in enumerate(zip(ids, expected, strict=False)) if one != other)
            raise ModelError(
                f"the pair {query!r}, {passage[:40]!r} is tokenised otherwise from token {position} on: nothing is written"
            )
    scores = Reranker(spec, dtype="float32", device="cpu").score(formatted, np.zeros(len(PAIRS), np.int64))
    return float(np.abs(scores - np.array(original["scores"])).max())

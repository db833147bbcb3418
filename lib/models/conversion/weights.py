"""Convert the weights of rerankers with model code of their own to transformers' classes.

Each converter returns the configuration and the weights of a sequence classifier with one label. It runs none of the
checkpoint's code. job.py verifies that the converted network gives the same scores.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ModelError
from ..files import read_json
from ..reranker_spec import SPEC_FILE

Weights = dict[str, Tensor]
SHAPE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id"),
)
# Endings of the files that are not copied: code, weights and the configuration.
NOT_COPIED = (".py", ".bin", ".safetensors", ".index.json", "config.json", ".gguf")


def from_zhinao(config: Mapping[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """Convert 360Zhinao, which is LLaMA with biases and with query, key and value of each kv head in one matrix.

    Qwen2 has the same biases, but transformers 5 gives every model of that type Qwen's own pre-tokenizer.
    """
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    converted: Weights = {}
    for name, tensor in weights.items():
        if ".qkv_proj." in name:
            grouped = tensor.unflatten(0, (groups, heads // groups + 2, -1))
            projections = {"q_proj": grouped[:, :-2], "k_proj": grouped[:, -2], "v_proj": grouped[:, -1]}
            for projection, rows in projections.items():
                matrix = rows.flatten(0, rows.dim() - tensor.dim())
                converted[name.replace("qkv_proj", projection)] = matrix.contiguous()
        elif name.startswith("model.") and "rotary_emb" not in name:
            converted[name] = tensor
            if name.endswith(".o_proj.weight"):
                converted[name.replace("weight", "bias")] = tensor.new_zeros(len(tensor))
    if "linear.bias" in weights and weights["linear.bias"].any():
        raise ModelError("the scalar head has a bias, which transformers' classifier cannot hold")
    converted["score.weight"] = weights["linear.weight"]
    return _config(config, config["num_hidden_layers"]) | {"attention_bias": True}, converted


def from_minicpm(config: Mapping[str, Any], weights: Weights, layer: int) -> tuple[dict[str, Any], Weights]:
    """Convert the first `layer` layers of MiniCPM: LLaMA with scaled embeddings, attention and feed-forward outputs."""
    layers, first_head = config["num_hidden_layers"], config["start_layer"]
    scale = config["scale_depth"] / math.sqrt(layers)
    converted: Weights = {}
    for name, tensor in weights.items():
        number = name.removeprefix("model.layers.").split(".")[0]
        if not name.startswith("model.") or "rotary_emb" in name or (number.isdigit() and int(number) >= layer):
            continue
        factor = scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        converted[name] = tensor * (config["scale_emb"] if name == "model.embed_tokens.weight" else factor)
    converted["score.weight"] = weights[f"lm_head.{layer - first_head}.linear_head.weight"]
    return _config(config, layer), converted


def write_tokenizer(target: Path, encoding: Mapping[str, Any]) -> None:
    """Write a tiktoken encoding (pattern, base64 ranks, ids and names of special tokens) as transformers' tokenizer files.

    transformers' converter reads the ranks; job.py verifies the ids. Raises ModelError without tiktoken.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    target.mkdir()
    file = target / "ranks.tiktoken"
    file.write_text("".join(f"{token} {rank}\n" for token, rank in encoding["ranks"].items()))
    special = sorted(encoding["special"], key=encoding["special"].__getitem__)
    try:
        backend = TikTokenConverter(str(file), pattern=encoding["pattern"], extra_special_tokens=special).converted()
    except ValueError as error:
        raise ModelError(
            f"the tokenizer is one of tiktoken's: pip install tiktoken, and try again ({error})"
        ) from error
    backend.post_processor = None  # the converter adds special tokens of its own
    PreTrainedTokenizerFast(tokenizer_object=backend, **encoding["names"]).save_pretrained(target)
    file.unlink()


def write(
    source: Path, target: Path, config: Mapping[str, Any], weights: Weights, pair_format: Mapping[str, Any]
) -> None:
    """Write a directory: the tokenizer files of `source`, configuration, weights, and `pair_format` for read_rerank_spec."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copy(file, target / file.name)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, target / "model.safetensors", {"format": "pt"}
    )
    (target / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = read_json(source / "tokenizer_config.json", {})
    tokenizer.pop("auto_map", None)
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))
    (target / SPEC_FILE).write_text(json.dumps(pair_format, indent=1))


def _config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the configuration of the LLaMA classifier with `layers` layers."""
    shape = {name: config[name] for name in SHAPE_KEYS if config.get(name) is not None}
    return shape | {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "num_hidden_layers": layers,
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "tie_word_embeddings": False,
        "dtype": config.get("torch_dtype") or config.get("dtype") or "float32",
    }

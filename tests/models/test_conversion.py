"""Conversion of rerankers with code of their own: tiny checkpoints of the same shapes, with code written for the test."""

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

import lib.models.conversion.job
import lib.models.conversion.weights
from lib.errors import ModelError, UsageError
from lib.models.conversion.job import ConvertConfig, convert
from lib.models.reranker_spec import read_rerank_spec
from tests.support import tiny

REMOTE = Path(__file__).parents[1] / "support" / "remote"
SHAPE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    "max_position_embeddings": 4096,
}
MINICPM = {"model_type": "minicpm", "start_layer": 2, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16}


def checkpoint(folder, **changes):
    """Write a directory as its authors publish it: own code, own model type, weights in torch's format."""
    sys.path.insert(0, str(REMOTE))
    from tests.support.remote.modeling_tiny import TinyConfig, TinyForCausalLM

    code = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    folder.mkdir()
    if changes:
        tokenizer = tiny.qwen_chat()
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|endoftext|>"})
        tokenizer.save_pretrained(folder)
    else:
        tokenizer = tiktoken_files(folder)
    config = TinyConfig(**SHAPE, vocab_size=len(tokenizer) + 8)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(5)
    network = TinyForCausalLM(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    shutil.copy(REMOTE / "modeling_tiny.py", folder)
    written = config.to_dict() | changes | {"model_type": changes.get("model_type", "zhinao"), "auto_map": code}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return folder


def tiktoken_files(folder):
    """Write a slow tokenizer with code of its own, over a file of ranks: bytes, then the merges of a byte-level BPE."""
    from tests.support.remote.tokenization_tiny import FILE, TinyTokenizer

    merges = json.loads(tiny.qwen().backend_tokenizer.to_str())["model"]["merges"]
    characters = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"".join(characters[letter] for letter in "".join(pair)) for pair in merges]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    (folder / FILE).write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in ranks.items()))
    shutil.copy(REMOTE / "tokenization_tiny.py", folder)
    tokenizer_config = {
        "tokenizer_class": "TinyTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return TinyTokenizer(str(folder / FILE))


def run(source, target, **changes):
    settings = {"model": str(source), "output": str(target), "reference_python": sys.executable}
    return convert(ConvertConfig(**(settings | changes)))


@pytest.fixture(scope="module")
def zhinao(tmp_path_factory):
    """A checkpoint of 360Zhinao's shape, its converted directory, the largest difference, and the original's scores."""
    folder = tmp_path_factory.mktemp("zhinao")
    source, calls = checkpoint(folder / "360Zhinao"), []
    score = lib.models.conversion.job._original_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lib.models.conversion.job,
            "_original_scores",
            lambda *arguments: calls.append(score(*arguments)) or calls[0],
        )
        return source, folder / "converted", run(source, folder / "converted"), calls[0]


def test_360zhinao_is_a_llama_classifier(zhinao):
    """The network split from the fused matrix scores 100 pairs as the original does, with tiktoken's ranks as tokenizer.

    The conversion detects the token at which the score is read. The written directory needs no code and no recipe.
    """
    _, target, error, _ = zhinao

    assert error < 1e-4
    spec = read_rerank_spec(str(target))
    assert spec.segments[-2:] == ("<|im_start|>assistant", "\n")
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    assert not list(target.glob("*.py"))


def test_layerwise_minicpm_is_a_llama_classifier(tmp_path):
    """The first layers and their head, with the scales folded into the weights, score as the original does."""
    source = checkpoint(tmp_path / "layerwise", **MINICPM)
    assert run(source, tmp_path / "converted", layer=2) < 1e-4


def test_a_network_that_scores_otherwise_is_not_written(tmp_path, zhinao, monkeypatch):
    """A conversion that reads the fused matrix in the wrong order is refused with the difference, and writes nothing."""
    convert_function, (source, *_, original) = lib.models.conversion.weights.from_zhinao, zhinao
    monkeypatch.setattr(lib.models.conversion.job, "_original_scores", lambda *_: original)
    monkeypatch.setattr(
        lib.models.conversion.weights,
        "from_zhinao",
        lambda config, weights: convert_function(config, _swapped(weights)),
    )
    with pytest.raises(ModelError, match="nothing is written"):
        run(source, tmp_path / "converted")
    assert not list(tmp_path.iterdir())


def _swapped(weights):
    return {name: tensor.flip(0) if "qkv_proj" in name else tensor for name, tensor in weights.items()}


def test_wrong_requests_are_refused(tmp_path):
    """An existing output, another model type, a missing or needless layer, and code that does not run are refused."""
    source = checkpoint(tmp_path / "layerwise", **MINICPM)
    with pytest.raises(UsageError, match="exists already"):
        run(source, tmp_path)
    with pytest.raises(UsageError, match="--layer"):
        run(source, tmp_path / "converted")
    with pytest.raises(UsageError, match="choose 2 to 3"):
        run(source, tmp_path / "converted", layer=1)
    with pytest.raises(UsageError, match="cannot be run"):
        run(source, tmp_path / "converted", layer=2, reference_python="/no/python")
    with pytest.raises(ModelError, match="did not run"):
        run(source, tmp_path / "converted", layer=2, reference_python="/bin/false")
    with pytest.raises(ModelError, match="neither 360Zhinao nor"):
        run(tiny.build_reranker("bert", tmp_path / "bert"), tmp_path / "converted")


def test_a_tokenizer_that_differs_is_not_written(tmp_path, zhinao, monkeypatch):
    """Token ids that differ from the original tokenizer's are named, before any score hides them."""
    convert_function, (source, *_, original) = lib.models.conversion.weights.write_tokenizer, zhinao
    monkeypatch.setattr(lib.models.conversion.job, "_original_scores", lambda *_: original)
    other = {"pattern": r"\p{L}{1,3}|[^\p{L}]+"}
    monkeypatch.setattr(
        lib.models.conversion.weights, "write_tokenizer", lambda to, encoding: convert_function(to, encoding | other)
    )
    with pytest.raises(ModelError, match="tokenised otherwise"):
        run(source, tmp_path / "converted")

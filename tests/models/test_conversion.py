"""Rerankers that bring their own code, converted: on tiny checkpoints of the same shapes, with code written for the test."""

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
    """A directory as its authors would have left it: own code, own model type, weights in torch's format."""
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
    """A slow tokenizer with code of its own over a file of ranks: bytes, then what a byte-level BPE has merged."""
    from tests.support.remote.tokenization_tiny import FILE, TinyTokenizer

    merges = json.loads(tiny.qwen().backend_tokenizer.to_str())["model"]["merges"]
    characters = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"".join(characters[letter] for letter in "".join(pair)) for pair in merges]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    (folder / FILE).write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in ranks.items()))
    shutil.copy(REMOTE / "tokenization_tiny.py", folder)
    about = {
        "tokenizer_class": "TinyTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return TinyTokenizer(str(folder / FILE))


def run(source, target, **changes):
    settings = {"model": str(source), "output": str(target), "reference_python": sys.executable}
    return convert(ConvertConfig(**(settings | changes)))


@pytest.fixture(scope="module")
def zhinao(tmp_path_factory):
    """A checkpoint of 360Zhinao's shape, converted; the largest difference; and what its own code made, run only once."""
    folder = tmp_path_factory.mktemp("zhinao")
    source, right, kept = checkpoint(folder / "360Zhinao"), lib.models.conversion.job._original_scores, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lib.models.conversion.job, "_original_scores", lambda *given: kept.append(right(*given)) or kept[0]
        )
        return source, folder / "made", run(source, folder / "made"), kept[0]


def test_360zhinao_is_a_llama_classifier(zhinao):
    """Split from the fused matrix, the network scores 100 pairs as the brought code does; the token that the scalar is
    read at is found, the tokenizer made of tiktoken's ranks; what is written needs no code and no recipe."""
    _, made, error, _ = zhinao

    assert error < 1e-4
    spec = read_rerank_spec(str(made))
    assert spec.segments[-2:] == ("<|im_start|>assistant", "\n")
    assert "auto_map" not in json.loads((made / "config.json").read_text())
    assert not list(made.glob("*.py"))


def test_layerwise_minicpm_is_a_llama_classifier(tmp_path):
    """Its scales folded into the weights, the first layers and their head score as the brought code does."""
    source = checkpoint(tmp_path / "layerwise", **MINICPM)
    assert run(source, tmp_path / "made", layer=2) < 1e-4


def test_a_network_that_scores_otherwise_is_not_written(tmp_path, zhinao, monkeypatch):
    """A fused matrix read the wrong way round: refused with the difference, and nothing is left."""
    right, (source, *_, original) = lib.models.conversion.weights.from_zhinao, zhinao
    monkeypatch.setattr(lib.models.conversion.job, "_original_scores", lambda *_: original)
    monkeypatch.setattr(
        lib.models.conversion.weights, "from_zhinao", lambda config, weights: right(config, _swapped(weights))
    )
    with pytest.raises(ModelError, match="nothing is written"):
        run(source, tmp_path / "made")
    assert not list(tmp_path.iterdir())


def _swapped(weights):
    return {name: tensor.flip(0) if "qkv_proj" in name else tensor for name, tensor in weights.items()}


def test_what_cannot_be_converted_is_told(tmp_path):
    """An output that is there, another model type, a missing or needless layer, code that does not run."""
    source = checkpoint(tmp_path / "layerwise", **MINICPM)
    with pytest.raises(UsageError, match="exists already"):
        run(source, tmp_path)
    with pytest.raises(UsageError, match="--layer"):
        run(source, tmp_path / "made")
    with pytest.raises(UsageError, match="choose 2 to 3"):
        run(source, tmp_path / "made", layer=1)
    with pytest.raises(UsageError, match="cannot be run"):
        run(source, tmp_path / "made", layer=2, reference_python="/no/python")
    with pytest.raises(ModelError, match="did not run"):
        run(source, tmp_path / "made", layer=2, reference_python="/bin/false")
    with pytest.raises(ModelError, match="neither 360Zhinao nor"):
        run(tiny.build_reranker("bert", tmp_path / "bert"), tmp_path / "made")


def test_a_tokenizer_that_differs_is_not_written(tmp_path, zhinao, monkeypatch):
    """Other token ids than the brought tokenizer's are named, before any score hides them."""
    right, (source, *_, original) = lib.models.conversion.weights.write_tokenizer, zhinao
    monkeypatch.setattr(lib.models.conversion.job, "_original_scores", lambda *_: original)
    other = {"pattern": r"\p{L}{1,3}|[^\p{L}]+"}
    monkeypatch.setattr(
        lib.models.conversion.weights, "write_tokenizer", lambda to, encoding: right(to, encoding | other)
    )
    with pytest.raises(ModelError, match="tokenised otherwise"):
        run(source, tmp_path / "made")

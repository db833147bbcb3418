"""Networks of published shapes with random weights, which are as fast, and a tokenizer of whole words for them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3 of the built models


@dataclass(frozen=True)
class Shape:
    """A network to build: transformers' config class, its settings, and what replaces them for a try on a CPU."""

    name: str
    config: str
    pooling: str
    settings: dict[str, Any]
    small: dict[str, Any]


NAMES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
BERT = dict(zip(NAMES, (30522, 768, 12, 12, 3072), strict=True), max_position_embeddings=512)
XLM_R = dict(zip(NAMES, (250002, 1024, 24, 16, 4096), strict=True), max_position_embeddings=514)
QWEN = dict(zip(NAMES, (151936, 1024, 28, 16, 3072), strict=True), max_position_embeddings=32768)
GROUPED = {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
TINY = dict(zip(NAMES, (500, 64, 2, 4, 128), strict=True))
SHAPES = (
    Shape("BERT-base", "BertConfig", "mean", BERT, TINY),
    Shape("XLM-R-large", "XLMRobertaConfig", "cls", XLM_R, TINY),
    Shape("Qwen3-0.6B", "Qwen3Config", "lasttoken", QWEN | GROUPED, TINY | {"num_key_value_heads": 2, "head_dim": 16}),
)


def build(shape: Shape, folder: Path, small: bool, device: torch.device) -> Path:
    """A model directory in sentence-transformers' layout with random weights, and a tokenizer of whole words."""
    settings = shape.settings | (shape.small if small else {})
    config = getattr(transformers, shape.config)(**settings, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    kind = transformers.AutoModelForCausalLM if shape.pooling == "lasttoken" else transformers.AutoModel
    torch.manual_seed(7)
    with torch.device(device):
        network = kind.from_config(config)
    with torch.no_grad():  # the usual initialisation is so small that a wrong neighbour would hardly show
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    path = folder / shape.name
    network.save_pretrained(path)
    _word_tokenizer(settings["vocab_size"]).save_pretrained(path)
    _write(path / "modules.json", [_module(0, "", "Transformer"), _module(1, "1_Pooling", "Pooling")])
    pooling = {"embedding_dimension": settings["hidden_size"], "pooling_mode": shape.pooling}
    _write(path / "1_Pooling/config.json", pooling)
    _write(path / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    return path


def _module(index: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def _word_tokenizer(size: int) -> Any:
    """Words w4, w5, ... of one token each, between <s> and </s>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *(f"w{i}" for i in range(len(SPECIALS), size))]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **named)

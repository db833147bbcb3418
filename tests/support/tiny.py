"""Tiny random models in sentence-transformers' layout, built offline in a fraction of a second each.

    path = build("bert", tmp_path, pooling="cls", dense=16)

The random weights are so large that a wrong mask, position or window changes the vectors visibly.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny_tokenizers import TEXT as TEXT
from tests.support.tiny_tokenizers import byte_level, gemma, qwen, qwen_chat, unigram, word_piece

HIDDEN, LAYERS, HEADS = 32, 2, 4
SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}


def _bert(vocab: int, pad: int, positions: int = 128) -> transformers.PreTrainedModel:
    return transformers.BertModel(
        transformers.BertConfig(**SHAPE, vocab_size=vocab, max_position_embeddings=positions, pad_token_id=pad)
    )


def _roberta(vocab: int, pad: int) -> transformers.PreTrainedModel:
    config = transformers.RobertaConfig(**SHAPE, vocab_size=vocab, max_position_embeddings=130, pad_token_id=pad)
    return transformers.RobertaModel(config)


def _xlm_roberta(vocab: int, pad: int, positions: int = 128) -> transformers.PreTrainedModel:
    config = transformers.XLMRobertaConfig(
        **SHAPE, vocab_size=vocab, max_position_embeddings=positions + pad + 1, pad_token_id=pad
    )
    return transformers.XLMRobertaModel(config)


def _mpnet(vocab: int, pad: int) -> transformers.PreTrainedModel:
    return transformers.MPNetModel(
        transformers.MPNetConfig(**SHAPE, vocab_size=vocab, max_position_embeddings=130, pad_token_id=pad)
    )


def _t5(vocab: int, pad: int) -> transformers.PreTrainedModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=vocab, d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=HEADS, pad_token_id=pad
        )
    )


def _modernbert(vocab: int, pad: int) -> transformers.PreTrainedModel:
    """Three layers: global, local, local; a token sees 8 neighbours on each side in a local layer."""
    shape = SHAPE | {"num_hidden_layers": 3}
    config = transformers.ModernBertConfig(
        **shape,
        vocab_size=vocab,
        max_position_embeddings=256,
        local_attention=16,
        global_attn_every_n_layers=3,
        pad_token_id=pad,
    )
    return transformers.ModernBertModel(config)


def _qwen2(vocab: int, pad: int, positions: int = 256, **options: Any) -> transformers.PreTrainedModel:
    config = transformers.Qwen2Config(
        **SHAPE,
        vocab_size=vocab,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        pad_token_id=pad,
        eos_token_id=pad,
        **options,
    )
    return transformers.Qwen2Model(config)


def _qwen2_bidirectional(vocab: int, pad: int) -> transformers.PreTrainedModel:
    return _qwen2(vocab, pad, is_causal=False)


def _qwen2_window(vocab: int, pad: int) -> transformers.PreTrainedModel:
    return _qwen2(vocab, pad, use_sliding_window=True, sliding_window=8, max_window_layers=1)


def _qwen2_bidirectional_window(vocab: int, pad: int) -> transformers.PreTrainedModel:
    return _qwen2(vocab, pad, use_sliding_window=True, sliding_window=8, max_window_layers=1, is_causal=False)


def _qwen3_config(vocab: int, pad: int, positions: int = 256) -> transformers.Qwen3Config:
    shape = SHAPE | {"num_key_value_heads": 2, "head_dim": 16}
    return transformers.Qwen3Config(**shape, vocab_size=vocab, max_position_embeddings=positions, pad_token_id=pad)


def _qwen3(vocab: int, pad: int) -> transformers.PreTrainedModel:
    return transformers.Qwen3Model(_qwen3_config(vocab, pad))


Network = Callable[..., transformers.PreTrainedModel]
MODELS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], Network]] = {
    "bert": (word_piece, _bert),
    "roberta": (byte_level, _roberta),
    "xlm-roberta": (unigram, _xlm_roberta),
    "mpnet": (unigram, _mpnet),
    "t5": (unigram, _t5),
    "modernbert": (word_piece, _modernbert),
    "qwen2": (qwen, _qwen2),
    "qwen2-bidirectional": (qwen, _qwen2_bidirectional),
    "qwen2-window": (qwen, _qwen2_window),
    "qwen2-bidirectional-window": (qwen, _qwen2_bidirectional_window),
    "qwen3": (qwen, _qwen3),
}


def build(
    kind: str,
    folder: Path,
    *,
    pooling: str | list[str] = "mean",
    include_prompt: bool = True,
    dense: int = 0,
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    max_seq_length: int | None = 64,
    matryoshka: bool = False,
    positions: int | None = None,
) -> Path:
    """Write a model directory and return it.

    dense: width of a dense layer, 0 for none. positions: the longest input in tokens, for "bert", "xlm-roberta" and "qwen2".
    """
    make_tokenizer, make_network = MODELS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    longest = {"positions": positions} if positions else {}
    network = make_network(len(tokenizer), tokenizer.pad_token_id, **longest)
    with torch.no_grad():  # the default initialisation is so small that attention has almost no effect
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules: list[tuple[str, str]] = [("", "Transformer"), ("1_Pooling", "Pooling")]
    width = HIDDEN * (1 if isinstance(pooling, str) else len(pooling))
    _write(
        folder / "1_Pooling/config.json",
        {"embedding_dimension": HIDDEN, "pooling_mode": pooling, "include_prompt": include_prompt},
    )
    if dense:
        modules.append(("2_Dense", "Dense"))
        write_dense(folder / "2_Dense", width, dense)
    if normalize:
        modules.append(("3_Normalize", "Normalize"))
        (folder / "3_Normalize").mkdir(exist_ok=True)
    _write(folder / "modules.json", [_module(i, path, kind) for i, (path, kind) in enumerate(modules)])
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}, "default_prompt_name": None})
    if matryoshka:
        (folder / "README.md").write_text("Trained with MatryoshkaLoss.")
    return folder


def write_dense(folder: Path, wide: int, narrow: int, activation: str = "torch.nn.modules.activation.Tanh") -> None:
    """Write a dense layer with random weights in sentence-transformers' layout."""
    from safetensors.torch import save_file

    _write(
        folder / "config.json",
        {"in_features": wide, "out_features": narrow, "bias": True, "activation_function": activation},
    )
    save_file(
        {"linear.weight": torch.randn(narrow, wide) * 0.3, "linear.bias": torch.randn(narrow)},
        folder / "model.safetensors",
    )


def _module(index: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}


def build_reranker(kind: str, folder: Path, *, tied: bool = False) -> Path:
    """Write a reranker that takes 512 tokens and return its folder: a classifier with one label, or a language model."""
    make_tokenizer, make_network = RERANKERS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    torch.manual_seed(11)
    network = make_network(len(tokenizer), tokenizer.pad_token_id, tied)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    network.save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def _classifier(make_config: Callable[..., Any], positions: int) -> Network:
    def make(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
        config = make_config(
            **SHAPE, vocab_size=vocab, max_position_embeddings=positions, pad_token_id=pad, num_labels=1
        )
        return transformers.AutoModelForSequenceClassification.from_config(config)

    return make


def _modernbert_classifier(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
    config = _modernbert(vocab, pad).config
    config.num_labels, config.max_position_embeddings, config.classifier_pooling = 1, 512, "mean"
    return transformers.ModernBertForSequenceClassification(config)


def _qwen3_classifier(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
    config = _qwen3_config(vocab, pad, 512)
    config.num_labels = 1
    return transformers.Qwen3ForSequenceClassification(config)


def _mistral_classifier(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
    """A decoder with a sliding window, shorter than many pairs."""
    shape = SHAPE | {"num_key_value_heads": 2, "sliding_window": 48}
    config = transformers.MistralConfig(**shape, vocab_size=vocab, max_position_embeddings=512, pad_token_id=pad)
    config.num_labels = 1
    return transformers.MistralForSequenceClassification(config)


def _llama_classifier(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
    """The architecture that 360Zhinao's reranker has after conversion."""
    config = transformers.LlamaConfig(**SHAPE, vocab_size=vocab, max_position_embeddings=1200, attention_bias=True)
    config.pad_token_id, config.num_labels = pad, 1
    return transformers.LlamaForSequenceClassification(config)


def _qwen3_language(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
    config = _qwen3_config(vocab, pad, 512)
    config.tie_word_embeddings = tied
    return transformers.Qwen3ForCausalLM(config)


def _gemma_language(vocab: int, pad: int, tied: bool) -> transformers.PreTrainedModel:
    shape = SHAPE | {"num_key_value_heads": 1, "head_dim": 16}
    config = transformers.GemmaConfig(**shape, vocab_size=vocab, max_position_embeddings=512, pad_token_id=pad)
    return transformers.GemmaForCausalLM(config)


RERANKERS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], Network]] = {
    "bert": (word_piece, _classifier(transformers.BertConfig, 512)),
    "roberta": (byte_level, _classifier(transformers.RobertaConfig, 514)),
    "xlm-roberta": (unigram, _classifier(transformers.XLMRobertaConfig, 514)),
    "modernbert": (word_piece, _modernbert_classifier),
    "qwen3-classifier": (qwen, _qwen3_classifier),
    "mistral-classifier": (qwen, _mistral_classifier),
    "llama-classifier": (qwen_chat, _llama_classifier),
    "qwen3": (qwen_chat, _qwen3_language),
    "gemma": (gemma, _gemma_language),
}


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))

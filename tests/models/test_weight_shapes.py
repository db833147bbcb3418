"""What the weights' and the tokenizer's files say about each other, before anything is loaded."""

import json
from typing import Any

import pytest
import torch
import transformers

from lib.errors import ModelError
from lib.models.encoder import Encoder
from lib.models.encoder_options import ModelOptions, resolve_encoder
from lib.models.reranker_options import RerankerOptions, resolve_reranker
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.reference import TEXTS, assert_close, reference


@pytest.fixture
def build(tmp_path: Any) -> Any:
    """A model directory of the test's own, which it changes."""
    return lambda kind, **options: tiny.build(kind, tmp_path / kind, **options)


def edit(file: Any, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "qwen2"])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(kind: str, build: Any) -> None:
    """A token without an embedding is refused by the files alone, for encoders and rerankers, with its name."""
    folder = build(kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zzyzx"])
    tokenizer.save_pretrained(folder)

    with pytest.raises(ModelError, match=r"1 tokens, 'zzyzx' among them.*vocab_size"):
        resolve_encoder(ModelOptions(model=str(folder)))


def test_a_reranker_s_tokenizer_is_checked_too(tmp_path: Any) -> None:
    """The same for rerankers, whose two labels are refused as early."""
    folder = tiny.build_reranker("bert", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<q>", "<d>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="2 tokens"):
        resolve_reranker(RerankerOptions(model=str(folder)))


@pytest.mark.parametrize("labels", [{"num_labels": 3}, {"id2label": {"0": "no", "1": "yes"}}, {"id2label": None}])
def test_a_reranker_of_several_labels_is_refused_by_its_files(labels: dict, tmp_path: Any) -> None:
    """config.json says how many numbers a pair gets (two where it says nothing, as transformers has it)."""
    folder = tiny.build_reranker("roberta", tmp_path)
    edit(folder / "config.json", **labels)

    with pytest.raises(ModelError, match="labels a pair; a reranker gives one"):
        resolve_reranker(RerankerOptions(model=str(folder)))


def test_the_token_of_an_image_may_have_no_row(build: Any) -> None:
    """EmbeddingGemma's tokenizer has one token more, an image's: texts are embedded, its name in a text is letters."""
    folder = build("qwen2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = reference(folder).encode(TEXTS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", image_token="<image_soft_token>")

    spec = read_spec(str(folder))
    vectors = Encoder(spec, dtype="float32").encode(Tokenizer(spec)([*TEXTS, "an <image_soft_token> here"]))

    assert_close(vectors[:-1], expected)


@pytest.mark.parametrize("kind", ["deberta", "qwen2", "bert"])
def test_lengths_beyond_the_trained_positions(kind: str, tmp_path: Any, build: Any) -> None:
    """A declared length over max_position_embeddings holds where positions are relative; a table of positions limits it."""
    folder = build("bert", positions=64) if kind == "bert" else build_long(kind, tmp_path)
    edit(folder / "sentence_bert_config.json", max_seq_length=200)
    texts = [" ".join(tiny.TEXT[:2] * 3)]

    spec = read_spec(str(folder))

    assert spec.max_tokens == (64 if kind == "bert" else 200)
    if kind != "bert":
        assert_close(Encoder(spec, dtype="float32").encode(Tokenizer(spec)(texts)), reference(folder).encode(texts))


def build_long(kind: str, folder: Any) -> Any:
    """A model without a table of positions that was trained for 64 of them."""
    folder = tiny.build("qwen2" if kind == "qwen2" else "bert", folder)
    if kind == "qwen2":
        edit(folder / "config.json", max_position_embeddings=64)
        return folder
    config = transformers.DebertaV2Config(
        **tiny.SHAPE,
        vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"],
        max_position_embeddings=64,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
        type_vocab_size=0,
    )
    torch.manual_seed(3)
    transformers.DebertaV2Model(config).save_pretrained(folder)
    return folder


def test_layers_of_another_width_are_refused(build: Any) -> None:
    """A dense layer that does not take what the pooling gives is refused by its config."""
    folder = build("bert", dense=16)
    edit(folder / "2_Dense/config.json", in_features=48)

    with pytest.raises(ModelError, match="takes vectors of 48 numbers, and the pooling gives 32"):
        read_spec(str(folder))


@pytest.mark.parametrize("content", [b"", b"\x10" * 40, b"\xff" * 9, (5).to_bytes(8, "little") + b"[1,2]"])
def test_damaged_weights_are_refused_in_a_sentence(content: bytes, build: Any) -> None:
    """A safetensors file without a header is refused before anything is loaded."""
    folder = build("bert")
    (folder / "model.safetensors").write_bytes(content)

    with pytest.raises(ModelError, match="is not a safetensors file"):
        read_spec(str(folder))

"""The packed encoder against sentence-transformers, for the real MiniLM and for tiny models of each family."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lib.errors import ModelError
from lib.models import encoder, modules_json
from lib.models.encoder import Encoder
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.reference import (
    EXACT_LENGTH,
    LONG,
    TEXTS,
    assert_close,
    cosines,
    minilm,
    one_by_one,
    reference,
    vectors,
)

MODES = list(modules_json.POOLING_MODES)


def test_minilm_equals_sentence_transformers() -> None:
    """The real all-MiniLM-L6-v2 gives sentence-transformers' vectors in float32, empty text included."""
    texts = [*TEXTS, "", LONG * 5]

    assert_close(vectors(minilm(), texts), reference(minilm()).encode(texts))


def test_minilm_in_bfloat16_stays_close_to_float32() -> None:
    """bfloat16 costs less than 0.0005 of cosine against sentence-transformers' float32."""
    actual = vectors(minilm(), TEXTS, dtype="bfloat16")

    assert cosines(actual, reference(minilm()).encode(TEXTS)).min() >= 0.9995


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_every_family_equals_sentence_transformers(kind: str, build: Any) -> None:
    """Each architecture gives sentence-transformers' vectors in float32, in the mode that it can run."""
    folder = build(kind)
    spec = read_spec(str(folder))
    runner = Encoder(spec, dtype="float32")

    assert runner.mode == ("exact-length" if kind in EXACT_LENGTH else "packed")
    assert_close(runner.encode(Tokenizer(spec)(TEXTS)), reference(folder).encode(TEXTS))


@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "qwen2-bidirectional"])
def test_bfloat16_is_no_worse_than_sentence_transformers_in_bfloat16(kind: str, build: Any) -> None:
    """In bfloat16 each family is as near to float32 as sentence-transformers in bfloat16 (random weights are noisy)."""
    folder, texts = build(kind), TEXTS[:6]
    exact = reference(folder).encode(texts)
    coarse = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    theirs = coarse.encode(texts, convert_to_tensor=True).float().numpy()
    ours = vectors(folder, texts, dtype="bfloat16")

    assert 1 - cosines(ours, exact).min() <= max(5e-4, 1.5 * (1 - cosines(theirs, exact).min()))


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
@pytest.mark.parametrize("mode", [*MODES, ["cls", "max", "mean"]], ids=str)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_every_pooling_with_a_prompt_equals_sentence_transformers(
    kind: str, mode: Any, include_prompt: bool, build: Any
) -> None:
    """Each pooling mode, alone or concatenated, with the prompt's tokens taken in or left out."""
    folder = build(kind, pooling=mode, include_prompt=include_prompt, normalize=False)
    prompt = "Instruct: find fish\nQuery: "

    assert_close(vectors(folder, TEXTS, prompt=prompt), reference(folder).encode(TEXTS, prompt=prompt))


def test_a_skipped_prompt_changes_the_vector(build: Any) -> None:
    """The comparison above is not empty: leaving out the prompt's tokens matters."""
    left_out, taken_in = (build("bert", pooling="mean", include_prompt=flag, normalize=False) for flag in (False, True))
    difference = vectors(left_out, TEXTS, prompt="query: ") - vectors(taken_in, TEXTS, prompt="query: ")

    assert np.abs(difference).max() > 1e-3


def test_dense_layers_equal_sentence_transformers(build: Any) -> None:
    """A dense layer with tanh after two concatenated poolings, then normalisation."""
    folder = build("bert", pooling=["cls", "mean"], dense=12)

    assert read_spec(str(folder)).dim == 12
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_a_directory_saved_by_sentence_transformers_reads_the_same(build: Any, tmp_path: Path) -> None:
    """The layout that sentence-transformers 6.2 writes itself, length in the tokenizer's configuration included."""
    folder = build("xlm-roberta", pooling="cls", dense=8)
    reference(folder).save(str(tmp_path / "saved"))

    assert read_spec(str(tmp_path / "saved")).max_tokens == 64
    assert_close(vectors(tmp_path / "saved", TEXTS), reference(folder).encode(TEXTS))


def test_old_pooling_booleans_and_a_transformer_subfolder(build: Any, tmp_path: Path) -> None:
    """Directories of the first sentence-transformers releases: one boolean a pooling mode, files in 0_Transformer."""
    folder = tmp_path / "old"
    shutil.copytree(build("bert"), folder)
    (folder / "0_Transformer").mkdir()
    for file in [
        file for file in folder.iterdir() if file.is_file() and file.name not in ("modules.json", "README.md")
    ]:
        if file.name != "config_sentence_transformers.json":
            file.rename(folder / "0_Transformer" / file.name)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    old = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(old))

    assert read_spec(str(folder)).pooling == ("cls", "max")
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_a_plain_checkpoint_is_pooled_as_sentence_transformers_does(build: Any, tmp_path: Path) -> None:
    """Without modules.json: mean pooling, no normalisation, the tokenizer's length."""
    folder = tmp_path / "plain"
    shutil.copytree(build("bert"), folder)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()

    assert read_spec(str(folder)).max_tokens == 128
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_truncated_vectors_are_renormalised(build: Any) -> None:
    """The first dimensions of a matryoshka model, at unit length again, as encode(normalize_embeddings=True)."""
    folder = build("bert", matryoshka=True)
    expected = reference(folder).encode(TEXTS, truncate_dim=8, normalize_embeddings=True)

    assert_close(vectors(folder, TEXTS, truncate_dim=8), expected)


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_text_has_one_vector_alone_in_a_batch_and_in_any_order(kind: str, build: Any) -> None:
    """Alone, among others, among others in reverse, and under another budget: the same vector."""
    spec = read_spec(str(build(kind)))
    runner, tokenizer = Encoder(spec, dtype="float32"), Tokenizer(spec)
    together = runner.encode(tokenizer(TEXTS))
    runner.token_budget = 70

    assert_close(one_by_one(spec, runner, TEXTS), together)
    assert_close(runner.encode(tokenizer(TEXTS[::-1]))[::-1], together)


@pytest.mark.parametrize("kind", sorted(tiny.MODELS.keys() - EXACT_LENGTH))
def test_neighbours_do_not_leak(kind: str, build: Any) -> None:
    """Replacing every other text of a packed batch by other tokens of the same lengths leaves a vector as it was."""
    spec = read_spec(str(build(kind)))
    runner, tokens = Encoder(spec, dtype="float32"), Tokenizer(spec)(TEXTS)
    kept = len(TEXTS) // 2
    ids = tokens.ids.copy()
    ids[: tokens.offsets[kept]] = 9
    ids[tokens.offsets[kept + 1] :] = 11
    changed = runner.encode(tokens._replace(ids=ids))

    assert_close(changed[kept], runner.encode(tokens)[kept])
    assert np.abs(changed[kept - 1] - runner.encode(tokens)[kept - 1]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_tokens_give_the_same_bits(dtype: str, build: Any) -> None:
    """Encoding twice, with encoders loaded separately, gives equal bytes."""
    spec = read_spec(str(build("bert")))
    tokens = Tokenizer(spec)(TEXTS)

    assert Encoder(spec, dtype=dtype).encode(tokens).tobytes() == Encoder(spec, dtype=dtype).encode(tokens).tobytes()


def test_a_text_without_tokens_gets_zeros(build: Any) -> None:
    """Such a text disturbs no other, and an empty call gives an empty array."""
    spec = read_spec(str(build("qwen2")))
    runner, tokenizer = Encoder(spec, dtype="float32"), Tokenizer(spec)
    actual = runner.encode(tokenizer(["", "fish", ""]))

    assert not actual[[0, 2]].any()
    assert_close(actual[1:2], runner.encode(tokenizer(["fish"])))
    assert runner.encode(tokenizer([])).shape == (0, 32)


def test_out_of_memory_halves_the_budget_and_loses_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches above the memory are retried smaller; the smaller budget is remembered; the vectors are the same."""
    spec = read_spec(str(build("bert")))
    runner, tokens = Encoder(spec, dtype="float32", token_budget=1000), Tokenizer(spec)(TEXTS)
    expected, packed = runner.encode(tokens), encoder.run_packed

    def small_memory(network: Any, batch: Any) -> Any:
        if len(batch.ids) > 130:
            raise torch.OutOfMemoryError("simulated")
        return packed(network, batch)

    monkeypatch.setattr(encoder, "run_packed", small_memory)

    assert_close(runner.encode(tokens), expected)
    assert runner.token_budget == 125


def test_one_text_that_exceeds_the_memory_is_an_error(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving ends at one document; the message says what to lower."""
    spec = read_spec(str(build("bert")))
    runner = Encoder(spec, dtype="float32")

    def no_memory(network: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(encoder, "run_packed", no_memory)
    with pytest.raises(ModelError, match="Lower max_tokens"):
        runner.encode(Tokenizer(spec)(TEXTS))

"""The encoder against sentence-transformers, for the real MiniLM and for tiny models of each family."""

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lib.errors import ModelError, UsageError
from lib.models import encoder
from lib.models.encoder import Encoder
from lib.models.spec import Tokens
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


def test_minilm_equals_sentence_transformers() -> None:
    """The real all-MiniLM-L6-v2 gives sentence-transformers' vectors in float32, with an empty text among them."""
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
    model = Encoder(spec, dtype="float32")

    assert model.mode == ("exact-length" if kind in EXACT_LENGTH else "packed")
    assert_close(model.encode(Tokenizer(spec)(TEXTS)), reference(folder).encode(TEXTS))


@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "qwen2-bidirectional"])
def test_bfloat16_is_no_worse_than_sentence_transformers_in_bfloat16(kind: str, build: Any) -> None:
    """Each family in bfloat16 is as near to float32 as sentence-transformers in bfloat16 (random weights are noisy)."""
    folder, texts = build(kind), TEXTS[:6]
    exact = reference(folder).encode(texts)
    coarse = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    theirs = coarse.encode(texts, convert_to_tensor=True).float().numpy()
    ours = vectors(folder, texts, dtype="bfloat16")

    assert 1 - cosines(ours, exact).min() <= max(5e-4, 1.5 * (1 - cosines(theirs, exact).min()))


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_text_has_one_vector_alone_in_a_batch_and_in_any_order(kind: str, build: Any) -> None:
    """A text has the same vector alone, among others, among others in reverse, and under another budget."""
    spec = read_spec(str(build(kind)))
    model, tokenizer = Encoder(spec, dtype="float32"), Tokenizer(spec)
    together = model.encode(tokenizer(TEXTS))
    model.token_budget = 70

    assert_close(one_by_one(spec, model, TEXTS), together)
    assert_close(model.encode(tokenizer(TEXTS[::-1]))[::-1], together)


@pytest.mark.parametrize("kind", sorted(tiny.MODELS.keys() - EXACT_LENGTH))
def test_neighbours_do_not_leak(kind: str, build: Any) -> None:
    """Other tokens in all neighbours of a text in a packed batch leave its vector as it was."""
    spec = read_spec(str(build(kind)))
    model, tokens = Encoder(spec, dtype="float32"), Tokenizer(spec)(TEXTS)
    middle = len(TEXTS) // 2
    ids = tokens.ids.copy()
    ids[: tokens.offsets[middle]] = 9
    ids[tokens.offsets[middle + 1] :] = 11
    changed = model.encode(tokens._replace(ids=ids))

    assert_close(changed[middle], model.encode(tokens)[middle])
    assert np.abs(changed[middle - 1] - model.encode(tokens)[middle - 1]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_tokens_give_the_same_bits(dtype: str, build: Any) -> None:
    """Two encoders loaded separately give equal bytes."""
    spec = read_spec(str(build("bert")))
    tokens = Tokenizer(spec)(TEXTS)

    assert Encoder(spec, dtype=dtype).encode(tokens).tobytes() == Encoder(spec, dtype=dtype).encode(tokens).tobytes()


def test_a_text_without_tokens_gets_zeros(build: Any) -> None:
    """A text without tokens gets zeros and changes no other vector; no texts give an empty array."""
    spec = read_spec(str(build("qwen2")))
    model, tokenizer = Encoder(spec, dtype="float32"), Tokenizer(spec)
    actual = model.encode(tokenizer(["", "fish", ""]))

    assert not actual[[0, 2]].any()
    assert_close(actual[1:2], model.encode(tokenizer(["fish"])))
    assert model.encode(tokenizer([])).shape == (0, 32)


def test_out_of_memory_halves_the_budget_and_loses_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch beyond the memory is retried with a smaller budget, which stays; the vectors are the same."""
    spec = read_spec(str(build("bert")))
    model, tokens = Encoder(spec, dtype="float32", token_budget=1000), Tokenizer(spec)(TEXTS)
    expected, packed = model.encode(tokens), encoder.run_packed

    def with_little_memory(network: Any, batch: Any) -> Any:
        if len(batch.ids) > 130:
            raise torch.OutOfMemoryError("simulated")
        return packed(network, batch)

    monkeypatch.setattr(encoder, "run_packed", with_little_memory)

    assert_close(model.encode(tokens), expected)
    assert model.token_budget == 125


def test_one_text_that_exceeds_the_memory_is_an_error(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving ends at one document, with a message that names the settings to lower."""
    spec = read_spec(str(build("bert")))
    model = Encoder(spec, dtype="float32")

    def without_memory(network: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(encoder, "run_packed", without_memory)
    with pytest.raises(ModelError, match="Lower max_tokens"):
        model.encode(Tokenizer(spec)(TEXTS))


def test_tokens_of_another_model_are_refused(build: Any) -> None:
    """Ids beyond the vocabulary and texts beyond the length raise before they reach a kernel."""
    spec = read_spec(str(build("bert")))
    model = Encoder(spec, dtype="float32")
    with pytest.raises(UsageError, match="use this model's Tokenizer"):
        model.encode(Tokens(np.array([99_999], np.int32), np.array([0, 1]), np.zeros(1, bool)))
    with pytest.raises(UsageError, match="the model takes 64"):
        model.encode(Tokens(np.ones(65, np.int32), np.array([0, 65]), np.zeros(1, bool)))


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"token_budget": 0}])
def test_wrong_arguments_are_refused(options: dict[str, Any], build: Any) -> None:
    """An unknown precision and a budget of 0 raise UsageError."""
    with pytest.raises(UsageError):
        Encoder(read_spec(str(build("bert"))), **options)

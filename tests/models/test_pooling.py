"""Pooling, dense layers, truncation and normalisation against sentence-transformers."""

from typing import Any

import numpy as np
import pytest

from lib.models import modules_json
from lib.models.spec_reader import read_spec
from tests.support.reference import (
    TEXTS,
    assert_close,
    reference,
    vectors,
)

MODES = list(modules_json.POOLING_MODES)


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
@pytest.mark.parametrize("mode", [*MODES, ["cls", "max", "mean"]], ids=str)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_every_pooling_with_a_prompt_equals_sentence_transformers(
    kind: str, mode: Any, include_prompt: bool, build: Any
) -> None:
    """Each pooling mode, alone or concatenated, gives equal vectors, with the prompt's tokens pooled or skipped."""
    folder = build(kind, pooling=mode, include_prompt=include_prompt, normalize=False)
    prompt = "Instruct: find fish\nQuery: "

    assert_close(vectors(folder, TEXTS, prompt=prompt), reference(folder).encode(TEXTS, prompt=prompt))


def test_a_skipped_prompt_changes_the_vector(build: Any) -> None:
    """Skipping the prompt's tokens changes the vectors, so the comparison above is not empty."""
    skipped, pooled = (build("bert", pooling="mean", include_prompt=flag, normalize=False) for flag in (False, True))
    difference = vectors(skipped, TEXTS, prompt="query: ") - vectors(pooled, TEXTS, prompt="query: ")

    assert np.abs(difference).max() > 1e-3


def test_dense_layers_equal_sentence_transformers(build: Any) -> None:
    """A dense layer with tanh after two concatenated poolings gives equal, normalised vectors."""
    folder = build("bert", pooling=["cls", "mean"], dense=12)

    assert read_spec(str(folder)).dim == 12
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_vectors_are_renormalised(build: Any, normalize: bool) -> None:
    """The first dimensions of a Matryoshka model, with a Normalize module or without, have unit length, as from
    encode(normalize_embeddings=True)."""
    folder = build("bert", matryoshka=True, normalize=normalize)
    expected = reference(folder).encode(TEXTS, truncate_dim=8, normalize_embeddings=True)

    assert_close(vectors(folder, TEXTS, truncate_dim=8), expected)

"""Texts and reference vectors for tests of models."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import tiny

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer

from benchmarks import demo
from lib.models.encoder import Encoder
from lib.models.spec import ModelSpec
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from lib.recipes import Recipe

LONG = " ".join(tiny.TEXT)
TEXTS = [
    *tiny.TEXT,
    "a",
    "fish",
    LONG,
    LONG[40:],
    "with <mask>, <pad> and [PAD] [SEP] </s> inside",
    "two words",
    "Two Words",
]
EXACT_LENGTH = {"mpnet", "t5"}
TOLERANCE = 1e-5


def minilm() -> Path:
    return Path(demo.minilm())


@cache
def reference(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def vectors(
    folder: Path,
    texts: list[str],
    dtype: str = "float32",
    prompt: str | None = None,
    truncate_dim: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Shoal's vectors of the texts; the model is read, the texts are tokenized and encoded as in a job. options: of a Recipe."""
    spec = read_spec(str(folder), Recipe(**options), truncate_dim=truncate_dim)
    tokenizer = Tokenizer(spec)
    tokens = tokenizer([(prompt or "") + text for text in texts])
    return Encoder(spec, dtype=dtype).encode(tokens, skip=tokenizer.prompt_tokens(prompt))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def one_by_one(spec: ModelSpec, runner: Encoder, texts: list[str]) -> np.ndarray:
    tokenizer = Tokenizer(spec)
    return np.concatenate([runner.encode(tokenizer([text])) for text in texts])


def change_json(folder: Path, name: str, **values: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)

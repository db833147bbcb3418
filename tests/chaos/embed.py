"""The embed job under fire: its input, its command, and what its rows must be."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tests.chaos.verify import SAMPLE, without_text, wrong
from tests.support.tiny import build

SCRIPT = "jobs/embed_corpus.py"
NORM_TOLERANCE, VECTOR_TOLERANCE = 1e-3, 1e-5


def model(folder: Path) -> str:
    return str(build("bert", folder))


def columns(texts: list[str | None], rng: random.Random) -> dict[str, list[str | None]]:
    return {"text": texts}


def check(source: pa.Table, rows: pa.Table, model: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Rows without a text have a reason and no vector, all others a vector of norm 1, that of the text embedded alone."""
    empty, reasons = without_text(source, rows, ("text",))
    vectors = rows["embedding"].combine_chunks()
    absent = vectors.is_null().to_numpy(zero_copy_only=False)
    norms = np.linalg.norm(matrix(vectors.drop_null()), axis=1)
    problems = wrong(
        {
            "rows without a text that lack a reason, or rows with one that have it": empty != reasons,
            "rows without a text that have a vector, or rows with one that lack it": empty != absent,
            "vectors whose norm is not 1": ~(np.abs(norms - 1) <= NORM_TOLERANCE),
        }
    )
    difference = farthest(source, rows, model, seed)
    if not difference <= VECTOR_TOLERANCE:
        problems.append(f"a vector differs by {difference} from the text embedded alone")
    return {"largest difference": difference}, problems


def matrix(vectors: pa.FixedSizeListArray) -> np.ndarray:
    return vectors.flatten().to_numpy().reshape(len(vectors), vectors.type.list_size)


def farthest(source: pa.Table, rows: pa.Table, model: str, seed: int) -> float:
    """The largest difference in any dimension of SAMPLE stored vectors from those texts embedded alone, one by one."""
    from lib.models.encoder import Encoder
    from lib.models.spec_reader import read_spec
    from lib.models.tokenizer import Tokenizer

    good = rows.filter(pc.is_valid(rows["embedding"]))
    sample = good.take(random.Random(seed).sample(range(len(good)), min(SAMPLE, len(good))))
    text_of = dict(zip(source["id"].to_pylist(), source["text"].to_pylist(), strict=True))
    spec = read_spec(model)
    encoder, tokenizer = Encoder(spec, dtype="float32", device="cpu"), Tokenizer(spec)
    again = np.stack([encoder.encode(tokenizer([text_of[key].strip()]))[0] for key in sample["id"].to_pylist()])
    return float(np.abs(again - matrix(sample["embedding"].combine_chunks())).max())

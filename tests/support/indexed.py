"""Small clustered vectors as files, an index of them, and exact search by numpy. For the tests of indexes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.index.build.config import IndexConfig
from lib.index.build_job import build

DIM = 32
ENCODER = {"model": "a model", "revision": "r1", "pooling": ["mean"], "prompt": "", "dim": DIM, "normalized": True}


def clustered(rows: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """float32 [rows, dim] of length 1, around a tenth as many middles, of uneven variance as embeddings are."""
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(99).standard_normal((200, dim))
    vectors = middles[random.integers(0, len(middles), rows)] + 0.5 * random.standard_normal((rows, dim))
    vectors *= np.linspace(2, 0.5, dim)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, vectors: np.ndarray, first: int = 0, absent: tuple[int, ...] = (), **encoder: Any) -> Path:
    """A file as embed_corpus.py leaves it. absent: rows without a vector, which have a reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.isin(np.arange(len(vectors)), absent)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1], mask=pa.array(mask))
    data = {
        "id": pa.array([f"d{first + row}" for row in range(len(vectors))], pa.large_string()),
        "embedding": column,
        "error": pa.array(["empty text" if gone else None for gone in mask], pa.string()),
    }
    about = ENCODER | {"dim": vectors.shape[1]} | encoder
    pq.write_table(pa.table(data).replace_schema_metadata({"shoal": json.dumps(about)}), path)
    return path


def write_many(folder: Path, vectors: np.ndarray, files: int = 3) -> Path:
    """The vectors in some files, in order."""
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), files)):
        write(folder / f"{number}.parquet", vectors[rows], first=int(rows[0]))
    return folder


def config_of(folder: Path, output: Path, **more: Any) -> IndexConfig:
    """The config of a build in this process, of the vectors in `folder`."""
    return configure(IndexConfig, **({"input": str(folder), "output": str(output), "executor": "local"} | more))


def built(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    """The card of an index of the vectors in `folder`, built in this process."""
    return build(config_of(folder, output, **more))


def exact(queries: np.ndarray, vectors: np.ndarray, most: int) -> np.ndarray:
    """Rows with the greatest products, int64 [queries, most], by numpy alone."""
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :most]


def segments(output: Path) -> list[Path]:
    return sorted((output / "segments").iterdir())


def cut_small(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Segments of about so many bytes, as a large corpus has many."""
    monkeypatch.setattr("lib.index.build.segments.SEGMENT_BYTES", size)
    monkeypatch.setattr("lib.index.build.segments.CENTROID_MULTIPLE", 0)

"""Exact search of a corpus's size, whole and on Ray, within the memory of a laptop. Run by `make scale`."""

import time

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.engine.workers import WorkerOptions
from lib.index.exact.job import ExactSearch, retrieve
from lib.storage.folder import Folder
from tests.scale.memory import memory_watched

PASSAGES, QUERIES, DIM, MOST, PARTS = 100_000, 2_000, 384, 1000, 12
MOST_BYTES = 4 << 30


def test_a_thousand_nearest_of_100_000_within_4_gb(cluster, tmp_path):
    """2,000 queries against 100,000 vectors of 384 dimensions, read from parts, the run merged by the driver: the thousand
    that IndexFlatIP finds, and all processes together, Ray's own and the driver among them, take at most 4 GB."""
    random = np.random.default_rng(0)
    passages, queries = (_unit(random, count) for count in (PASSAGES, QUERIES))
    for name, vectors, parts in (("passages", passages, PARTS), ("queries", queries, 2)):
        for number, piece in enumerate(np.array_split(np.arange(len(vectors)), parts)):
            _write(tmp_path / name / f"part-{number:06d}.parquet", name[0], piece, vectors[piece])
    search = ExactSearch(
        queries=str(tmp_path / "queries"),
        passages=str(tmp_path / "passages"),
        folder=Folder(str(tmp_path)),
        k=MOST,
        cosine=True,
        candidates=None,
        workers=WorkerOptions(),
    )
    began = time.monotonic()
    with memory_watched() as seen:
        run = pa.concat_tables(retrieve(search, Folder(str(tmp_path / "run"))))
    seconds = time.monotonic() - began
    began = time.monotonic()
    index = faiss.IndexFlatIP(DIM)
    index.add(passages)
    scores, places = index.search(queries, MOST)
    alone = time.monotonic() - began
    print(
        f"{seconds:.1f} s with reading, the start of actors and merging (IndexFlatIP on vectors in memory {alone:.1f} s)"
    )
    print(f"{max(seen) / 2**30:.2f} GiB at most, of it {seen[0] / 2**30:.2f} before")
    order = np.argsort([int(name[1:]) for name in run["query_id"].to_numpy()], kind="stable")
    found = np.array([int(name[1:]) for name in run["passage_id"].to_numpy()])[order].reshape(QUERIES, MOST)
    np.testing.assert_allclose(run["score"].to_numpy()[order].reshape(QUERIES, MOST), scores, atol=1e-5)
    assert (np.sort(found, axis=1) == np.sort(places, axis=1)).mean() > 0.9999
    assert max(seen) <= MOST_BYTES


def _unit(random: np.random.Generator, count: int) -> np.ndarray:
    vectors = random.standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write(path, letter: str, numbers: np.ndarray, vectors: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM)
    ids = [f"{letter}{number}" for number in numbers]
    pq.write_table(pa.table({"id": ids, "embedding": column, "error": pa.nulls(len(ids), pa.string())}), path)

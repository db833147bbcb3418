"""Every verb once, on 100 documents, in under a minute: the first test to run after any change."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import build, build_reranker

ROOT = Path(__file__).parents[1]


def test_every_verb_once(tmp_path):
    """embed and rerank, by the commands themselves: 100 rows in, 100 out, without noise."""
    began = time.monotonic()
    texts = [f"document {i}" for i in range(100)]
    assert run(tmp_path / "embed", "embed_corpus", {"text": texts}, build)["embedding"].null_count == 0
    pairs = {"query": texts, "passage": texts}
    assert run(tmp_path / "rerank", "rerank_pairs", pairs, build_reranker)["score"].null_count == 0
    assert time.monotonic() - began < 60


def run(folder, job, columns, build) -> pa.Table:
    """The single part that a job makes of 100 rows."""
    model = build("bert", folder / "model")
    (folder / "in").mkdir()
    pq.write_table(pa.table(columns), folder / "in" / "a.parquet")
    line = ["--input", folder / "in", "--output", folder / "out", "--model", model, "--max-workers", 1]
    done = subprocess.run(
        [sys.executable, f"jobs/{job}.py", *map(str, line)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (part,) = (folder / "out").glob("part-*")
    table = pq.read_table(part)
    assert len(table) == 100
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10, "noise:\n" + done.stderr
    return table

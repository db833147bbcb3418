"""Every verb once, on 100 documents, in under a minute: the first test to run after any change."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import build

ROOT = Path(__file__).parents[1]


def test_every_verb_once(tmp_path):
    """embed: 100 documents in, 100 vectors out, by the command itself."""
    model = build("bert", tmp_path / "model")
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(100)]}), tmp_path / "in" / "a.parquet")
    began = time.monotonic()
    line = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--model", model]
    done = subprocess.run(
        [sys.executable, "jobs/embed_corpus.py", *map(str, line)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "out").glob("part-*")
    assert pq.read_table(part)["embedding"].null_count == 0
    assert len(pq.read_table(part)) == 100
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10, "noise:\n" + done.stderr
    assert time.monotonic() - began < 60

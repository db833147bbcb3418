"""Every verb once, on 100 documents, in under a minute: the first test to run after any change."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import build, build_reranker

ROOT = Path(__file__).parents[1]
TEXTS = [f"document {i}" for i in range(100)]


def test_every_verb_once(cluster, tmp_path):
    """embed and rerank, by the commands' own programs: 100 rows in, 100 out."""
    began = time.monotonic()
    assert made_here(tmp_path / "embed", "embed_corpus", {"text": TEXTS}, build)["embedding"].null_count == 0
    pairs = {"query": TEXTS, "passage": TEXTS}
    assert made_here(tmp_path / "rerank", "rerank_pairs", pairs, build_reranker)["score"].null_count == 0
    assert time.monotonic() - began < 60


def test_a_command_starts_ray_without_noise(tmp_path):
    """On a machine without a cluster the command starts Ray, works and ends it; its own lines are all that it prints."""
    line = command(tmp_path, {"text": TEXTS}, build)
    environment = os.environ | {"RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "jobs/embed_corpus.py", *line], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path)) == 100
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10, "noise:\n" + done.stderr


def command(folder, columns, build) -> list[str]:
    """Options of a job over a file with these columns."""
    model = build("bert", folder / "model")
    (folder / "in").mkdir()
    pq.write_table(pa.table(columns), folder / "in" / "a.parquet")
    line = ["--input", folder / "in", "--output", folder / "out", "--model", model, "--max-workers", 1]
    return [str(word) for word in line]


def made_here(folder, job, columns, build) -> pa.Table:
    """The rows that a job's program makes, run in this process."""
    main = runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]
    assert main.main(command(folder, columns, build), standalone_mode=False) == 0
    return rows(folder)


def rows(folder) -> pa.Table:
    (part,) = (folder / "out").glob("part-*")
    table = pq.read_table(part)
    assert len(table) == 100
    return table

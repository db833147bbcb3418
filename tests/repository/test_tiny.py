"""Every verb once, on 100 documents: the first test to run after any change.

It takes under a minute on quiet cores. The budget of a file (tests/support/budget.py) keeps it so: a clock here would measure the
tests beside it too.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.tiny import build, build_reranker

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {i}" for i in range(100)]


def test_every_verb_once(cluster, tmp_path):
    """embed and rerank here, evaluate on Ray, compare, by the commands' own programs: 100 rows in, 100 out; a result and a page."""
    assert made_here(tmp_path / "embed", "embed_corpus", {"text": TEXTS}, build)["embedding"].null_count == 0
    pairs = {"query": TEXTS, "passage": TEXTS}
    assert made_here(tmp_path / "rerank", "rerank_pairs", pairs, build_reranker)["score"].null_count == 0
    page = evaluated_here(tmp_path / "evaluate")
    assert "evaluated_tiny" in page
    assert "<script" not in page


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


def evaluated_here(folder) -> str:
    """The page that compares a tiny model, evaluated on the texts as their own queries, with nothing."""
    (folder / "data").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": f"{i}", "text": text} for i, text in enumerate(TEXTS)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{name}.parquet")
    qrels = {"query-id": [f"{i}" for i in range(100)], "corpus-id": [f"{i}" for i in range(100)], "score": [1] * 100}
    (folder / "data" / "qrels").mkdir()
    pq.write_table(pa.table(qrels), folder / "data" / "qrels" / "test.parquet")
    model, out = build("bert", folder / "model"), folder / "out"
    line = ["--dataset", folder / "data", "--output", out, "--model", model, "--name", "evaluated tiny"]
    assert (
        program("evaluate_model").main([str(word) for word in [*line, "--max-workers", 1]], standalone_mode=False) == 0
    )
    assert program("compare_models").main(["--input", str(out)], standalone_mode=False) == 0
    return (out / "comparison.html").read_text()


def program(job) -> click.Command:
    return runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]


def command(folder, columns, build) -> list[str]:
    """Options of a job over a file with these columns."""
    model = build("bert", folder / "model")
    (folder / "in").mkdir()
    pq.write_table(pa.table(columns), folder / "in" / "a.parquet")
    line = ["--input", folder / "in", "--output", folder / "out", "--model", model, "--max-workers", 1]
    return [str(word) for word in line]


def made_here(folder, job, columns, build) -> pa.Table:
    """The rows that a job's program makes, run in this process."""
    line = [*command(folder, columns, build), "--executor", "local"]
    assert program(job).main(line, standalone_mode=False) == 0
    return rows(folder)


def rows(folder) -> pa.Table:
    (part,) = (folder / "out").glob("part-*")
    table = pq.read_table(part)
    assert len(table) == 100
    return table

"""The scripts of examples/: each does what its first line says. Bash expands them; this process runs the commands, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.storage.folder import Folder
from tests.real.head import Head
from tests.real.s3 import Ceph
from tests.repository.test_quickstart import ROOT, rows, run_here
from tests.support.tiny import build, build_reranker

SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.sh"))
RECORDING = (
    r'python() { printf "%s\0" "$@" "" >> "$COMMANDS"; }; export -f python; exec bash "$@"'  # two NULs end a command
)
LOCAL = {"jobs/compare_models.py": []}  # it has no executor to choose
TEXTS = [f"fish number {i} swims in shoal {i % 7}" for i in range(60)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(script, *words, **variables): the commands that the script would start, one after the other."""

    def run(script: str, *words: str, **variables: str) -> None:
        record = tmp_path / "commands"
        environment = os.environ | {"COMMANDS": str(record)} | variables
        line = ["bash", "-c", RECORDING, "bash", str(ROOT / "examples" / script), *words]
        subprocess.run(line, env=environment, check=True, cwd=tmp_path)
        monkeypatch.chdir(ROOT)  # where the scripts go
        for command in (words.split("\0") for words in record.read_text().split("\0\0") if words):
            if command[0] == "-c":
                subprocess.run([sys.executable, *command], check=True)
            else:
                run_here([*command, *LOCAL.get(command[0], ["--executor", "local"])])

    return run


@pytest.fixture
def model(tmp_path) -> str:
    return str(build("bert", tmp_path / "model"))


@pytest.fixture
def reranker(tmp_path) -> str:
    return str(build_reranker("bert", tmp_path / "reranker"))


def write_rows(path: Path, items: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def write_documents(path: Path) -> str:
    return write_rows(path, [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])


def write_dataset(folder: Path) -> str:
    """A data set in BEIR's layout: 8 queries, the words of a document each."""
    for name, count in (("corpus", len(TEXTS)), ("queries", 8)):
        write_rows(folder / f"{name}.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(TEXTS[:count])])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{i}\t{i}\t1\n" for i in range(8))
    )
    return str(folder)


def test_embed_folder(run, model, tmp_path, capfd):
    """A vector for each document of a folder, and a line that counts them."""
    write_documents(tmp_path / "docs" / "a.jsonl")
    run("embed_folder.sh", str(tmp_path / "docs"), str(tmp_path / "vectors"), MODEL=model)

    assert len(rows(tmp_path / "vectors")) == len(TEXTS)
    assert f"{len(TEXTS)} rows, 0 of them without a vector" in capfd.readouterr().out


@pytest.mark.parametrize("server", ["swift" if Ceph.missing() else "ceph"], indirect=True)
def test_embed_to_s3_and_index(run, model, tmp_path, bucket):
    """Vectors, an index and its card, in the bucket."""
    documents = write_documents(tmp_path / "a.jsonl")
    Folder(f"{bucket}/corpus").publish("a.jsonl", Path(documents).read_bytes())
    run("embed_to_s3_and_index.sh", bucket, MODEL=model)

    assert Folder(f"{bucket}/runs/vectors").exists("_manifest.parquet")
    assert b"recall" in Folder(f"{bucket}/runs/index").read("README.md")


def test_search_and_rerank(run, model, reranker, tmp_path):
    """Ten ranked passages for each query."""
    documents = write_documents(tmp_path / "docs.jsonl")
    queries = write_rows(tmp_path / "queries.jsonl", [{"id": f"q{i}", "text": TEXTS[i]} for i in range(5)])
    vectors, index, here = str(tmp_path / "vectors"), str(tmp_path / "index"), ["--executor", "local"]
    run_here(["jobs/embed_corpus.py", "--input", documents, "--output", vectors, "--model", model, *here])
    run_here(["jobs/build_index.py", "--input", vectors, "--output", index, *here])
    run("search_and_rerank.sh", index, queries, documents, str(tmp_path / "out"), RERANKER=reranker)

    ranked = rows(tmp_path / "out" / "scores")
    assert len(ranked) == 5 * 10
    assert {row["rank"] for row in ranked} == set(range(1, 11))


def test_finetune_and_compare(run, model, tmp_path):
    """A trained model, and a comparison of it with the one before."""
    pairs = [{"query": f"where is fish {i}", "pos": f"number {i} is in river {i}"} for i in range(70)]
    data, heldout = write_rows(tmp_path / "pairs.jsonl", pairs), write_dataset(tmp_path / "heldout")
    run("finetune_and_compare.sh", data, heldout, str(tmp_path / "out"), MODEL=model, STEPS="1")

    assert (tmp_path / "out" / "run" / "model" / "modules.json").exists()
    assert "after" in (tmp_path / "out" / "scores" / "comparison.md").read_text()


def test_evaluate_beir(run, model, reranker, tmp_path):
    """Results without and with the reranker, side by side."""
    out = tmp_path / "out"
    run("evaluate_beir.sh", write_dataset(tmp_path / "data"), str(out), MODEL=model, RERANKER=reranker)

    assert {path.name for path in (out / "results").iterdir()} == {"retriever", "with-reranker"}
    assert "with-reranker" in (out / "comparison.md").read_text()


def test_resubmit_on_cluster(model, tmp_path):
    """The script as it is, on a real head: the job runs there, with the code of this checkout."""
    documents = write_documents(tmp_path / "docs.jsonl")
    with Head(tmp_path) as head:
        variables = {"MODEL": model, "GPUS": "0", "WORKERS": "1", "ADDRESS": f"http://127.0.0.1:{head.dashboard}"}
        line = ["bash", str(ROOT / "examples" / "resubmit_on_cluster.sh"), documents, str(tmp_path / "vectors")]
        done = subprocess.run(line, env=head.environment | variables, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(rows(tmp_path / "vectors")) == len(TEXTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_and_has_its_test(script):
    """About 15 lines, a line of use in its head, a row in examples/README.md, and a test of its name."""
    text = (ROOT / "examples" / script).read_text()

    assert len(text.splitlines()) <= 18
    assert f"#   bash examples/{script} " in text
    assert f"({script})" in (ROOT / "examples" / "README.md").read_text()
    assert f"test_{Path(script).stem}" in globals()

"""Digests of everything that the jobs write, to compare a tree with itself after a restructuring.

    python benchmarks/same_bits.py --tree OLD --json old.json
    python benchmarks/same_bits.py --tree NEW --json new.json --before old.json

Each case runs one command of the tree on small inputs that this script makes from fixed seeds: texts, vectors and random
models. It prints a line a case, `case digest`; the JSON file holds the digest of each column, file set and number behind it.
With --before it also names the cases whose digests differ, and ends with 1 if there are any.

A digest is of content alone. Not in it, because it may change or differs by nature: names of parts and folders; metadata of
Parquet files (they name the model by its path, hence the work folder); seconds and rates; the pages for people. Of a segment
the whole file counts. Options that a restructuring renames stand in RENAMED; the tree's --help decides.

One worker with one thread does each case (--max-workers 1, --cpus-per-worker 1, OMP_NUM_THREADS=1), and the arithmetic is
float32. So two runs on one machine are equal to the bit. On another kind of processor BLAS rounds otherwise: run both trees on the
same one. GPUs are hidden: only the CPU is compared. The sample that an index is trained on is drawn with
seeds from path, size and time of the input files: the work folder is the same for both trees (so one run at a time), and the inputs'
time is fixed. Of the index of embedded texts the recall is left out: its input is a part, whose size hangs on its metadata.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.same_bits_inputs import make_inputs

Digests = dict[str, str]
KINDS = [
    "flat",
    "hnsw",
    "ivf-flat",
    "ivf-opq:code=8",
    "ivf-pq",
    "ivf-pq-fastscan",
    "ivf-rabitq",
    "ivf-rabitq:bits=1",
    "ivf-sq8",
]
RENAMED = {"nprobe": ("nprobe", "effort"), "ef_search": ("ef-search", "effort")}
ONE_WORKER = {"max_workers": 1, "cpus_per_worker": 1}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def digest(content: Any) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def table_digests(folder: Path, leave_out: Sequence[str] = ()) -> Digests:
    """By column, of the rows of all parts in the order of their names, which begin with the shard's number."""
    parts = [file for file in sorted(folder.glob("*.parquet")) if not file.name.startswith("_")]
    table = pa.concat_tables([pq.read_table(file).replace_schema_metadata() for file in parts])
    kept = sorted(set(table.column_names) - set(leave_out))
    return {name: digest(f"{table[name].type} {table[name].to_pylist()!r}".encode()) for name in kept} | {
        "rows": str(len(table))
    }


def file_digests(folder: Path, ending: str) -> str:
    """Of all files with this ending, wherever they lie below `folder`, but not of what stages left or of other cases."""
    files = [
        file
        for file in folder.rglob(f"*{ending}")
        if not any(name == "out" or name.startswith("_") for name in file.relative_to(folder).parts)
    ]
    return f"{len(files)} files {digest(sorted(digest(_without_names(file.read_bytes())) for file in files))}"


def _without_names(data: bytes) -> bytes:
    """A merged index names the file of its lists, whose name has the key of the build in it."""
    return re.sub(rb"[\w.-]+\.ivfdata", b"", data)


@dataclass(frozen=True)
class Bench:
    """A tree, and the folder with the inputs and with what the tree's jobs wrote, by case."""

    tree: Path
    work: Path

    def run(self, job: str, case: str, **options: Any) -> Path:
        """Run the tree's job into a new folder and return it. Raises ClickException with the end of what it printed."""
        output = self.work / "out" / case
        shutil.rmtree(output, ignore_errors=True)
        arguments = [f"jobs/{job}.py", "--output", str(output)]
        for name, value in (ONE_WORKER | options).items():
            text = str(self.work / value) if isinstance(value, Path) else str(value)
            arguments += [f"--{self.known(job, name)}", text]
        done = self.python(*arguments)
        if done.returncode:
            raise click.ClickException(f"{job}: ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return output

    def known(self, job: str, option: str) -> str:
        """The name that the tree has for an option."""
        names = RENAMED.get(option, (option.replace("_", "-"),))
        return names[0] if len(names) == 1 else next(name for name in names if name in options_of(self, job))

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | ENVIRONMENT
        environment |= {"PYTHONPATH": str(self.tree), "RAY_TMPDIR": str(self.work)}  # joins no cluster that is up
        line = [sys.executable, *arguments]
        return subprocess.run(line, cwd=self.tree, env=environment, capture_output=True, text=True, check=False)


@cache
def options_of(bench: Bench, job: str) -> set[str]:
    return set(re.findall(r"--([a-z][a-z-]*)", bench.python(f"jobs/{job}.py", "--help").stdout))


def inputs(bench: Bench, case: str) -> Digests:
    """What the other cases begin from: where this differs, all else does."""
    return {ending: file_digests(bench.work, ending) for ending in (".safetensors", ".jsonl", ".parquet")}


def embed(bench: Bench, case: str, **options: Any) -> Digests:
    common = {"input": Path("docs"), "model": Path("models/embedder"), "dtype": "float32", "shard_rows": 130}
    return table_digests(bench.run("embed_corpus", case, **common | options))


def rerank(bench: Bench, case: str, **options: Any) -> Digests:
    common = {"input": Path("pairs"), "model": Path("models/reranker"), "dtype": "float32"}
    return table_digests(bench.run("rerank_pairs", case, **common | options))


def index(bench: Bench, case: str, **options: Any) -> Digests:
    """Segments, trained index and merged ones; the ids that their numbers stand for; the recall that was measured."""
    common = {"input": Path("vectors"), "shard_rows": 700, "recall_queries": 100}
    output = bench.run("build_index", case, **common | options)
    recall = [sorted(json.dumps(row[name]) for name in row if name != "core_ms") for row in _card(output)["recall"]]
    return {
        "faiss": file_digests(output, ".faiss"),
        "ivfdata": file_digests(output, ".ivfdata"),
        "recall": digest(recall),
    } | {"ids": table_digests(output / "rows")["id"]}


def index_embedded(bench: Bench, case: str, **options: Any) -> Digests:
    """What the embed job left as an index, without its recall."""
    return {name: value for name, value in index(bench, case, **options).items() if name != "recall"}


def _card(output: Path) -> dict[str, Any]:
    return json.loads((output / "card.json").read_text())


def search(bench: Bench, case: str, **options: Any) -> Digests:
    """In an index that an earlier case built: of this run, or of one before in the same work folder."""
    common = {"input": Path("vector_queries.parquet"), "top_k": 20}
    return table_digests(bench.run("search_index", case, **common | options))


def evaluate(bench: Bench, case: str, **options: Any) -> Digests:
    common = {"task": "tiny", "dataset": Path("beir"), "dtype": "float32"}
    output = bench.run("evaluate_model", case, **common | options)
    (result,) = [json.loads(file.read_text()) for file in output.glob("results/*/*.json")]
    (queries,) = output.glob("results/*")
    numbers = {name: digest(result[name]) for name in ("scores", "intervals", "counts")}
    return numbers | {f"query {name}": value for name, value in table_digests(queries).items()}


def finetune(bench: Bench, case: str, **options: Any) -> Digests:
    common = {"data": Path("pairs.jsonl"), "batch": 16, "group": 4, "epochs": 8, "max_steps": 40, "dtype": "float32"}
    common |= {"learning_rate": 1e-3, "passage_tokens": 48, "token_budget": 512, "checkpoint_steps": 15, "seed": 3}
    output = bench.run("finetune_model", case, **common | options)
    steps = table_digests(output / "metrics", leave_out=("seconds",))
    return {"weights": file_digests(output / "model", ".safetensors")} | steps


EMBEDDER, RERANKER = Path("models/embedder"), Path("models/reranker")
JOINED = {"input": Path("candidates"), "queries": Path("queries.jsonl"), "corpus": Path("docs")}
FILES = {"input": Path("lines"), "keep_columns": "title"}
CASES: dict[str, tuple[Callable[..., Digests], dict[str, Any]]] = {
    "inputs": (inputs, {}),
    "embed-float32": (embed, {"keep_columns": "n"}),
    "embed-int8": (embed, FILES | {"output_dtype": "int8"}),
    "embed-chunks": (embed, {"chunk_tokens": 16, "chunk_overlap": 4}),
    "embed-m3": (embed, {"model": Path("models/m3"), "outputs": "dense,sparse,multi_vector"}),
    "rerank-encoder": (rerank, {"shard_rows": 200}),
    "rerank-decoder": (
        rerank,
        {"model": Path("models/qwen"), "recipe": "qwen3-reranker", "max_tokens": 1024, "limit": 200},
    ),
    "rerank-candidates": (rerank, JOINED | {"top_k": 5}),
    **{f"index-{kind}": (index, {"kind": kind} | ({"lists": 16} if "ivf" in kind else {})) for kind in KINDS},
    "index-merged": (index, {"kind": "ivf-flat", "lists": 16, "merge": 2}),
    "index-embedded": (index_embedded, {"kind": "flat", "input": Path("out/embed-float32")}),
    "search-ivf": (search, {"index": Path("out/index-ivf-pq"), "nprobe": 4}),
    "search-hnsw": (search, {"index": Path("out/index-hnsw"), "ef_search": 40}),
    "search-texts": (
        search,
        {"index": Path("out/index-embedded"), "input": Path("queries.jsonl"), "dtype": "float32"}
        | {"model": EMBEDDER, "reranker": RERANKER, "corpus": Path("docs")},
    ),
    "evaluate-embedder": (evaluate, {"model": EMBEDDER}),
    "evaluate-reranked": (evaluate, {"model": EMBEDDER, "reranker": RERANKER, "rerank_top": 20}),
    "finetune-embedder": (finetune, {"model": EMBEDDER, "loss": "infonce:temperature=0.05", "query_tokens": 16}),
    "finetune-reranker": (finetune, {"model": RERANKER, "loss": "listwise"}),
}


@click.command()
@click.option("--tree", required=True, type=click.Path(exists=True, path_type=Path), help="Checkout whose jobs run.")
@click.option("--only", default="", help="Cases that begin so, by commas. Default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File for all digests.")
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Such a file, to compare with.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for inputs and outputs, the same for both trees. Default: same_bits among temporary ones.",
)
def main(tree: Path, only: str, json_file: Path | None, before: Path | None, work: Path | None) -> None:
    """Run each case on the tree and print the digest of what it wrote."""
    bench = Bench(tree.resolve(), (work or Path(tempfile.gettempdir()) / "same_bits").resolve())
    make_inputs(bench.work)
    click.echo(f"lib: {bench.python('-c', 'import lib; print(lib.__file__)').stdout.strip()}", err=True)
    found = run_cases(bench, tuple(filter(None, only.split(","))) or ("",))
    shutil.rmtree(bench.work / "ray", ignore_errors=True)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))
    if before:
        compare(json.loads(before.read_text()), found)


def run_cases(bench: Bench, prefixes: tuple[str, ...]) -> dict[str, Digests]:
    """A case that fails is a line too, and the next one follows."""
    found: dict[str, Digests] = {}
    for case, (job, options) in CASES.items():
        if not case.startswith((*prefixes, "inputs")):
            continue
        began = time.monotonic()
        try:
            found[case] = job(bench, case.replace(":", "-"), **options)
        except (click.ClickException, OSError, ValueError, LookupError) as error:
            click.echo(f"{case}: {type(error).__name__}: {error}", err=True)
            found[case] = {"failed": str(error)}
        click.echo(f"{case:<24}{'failed' if 'failed' in found[case] else digest(found[case])[:16]}")
        click.echo(f"{case:<24}{time.monotonic() - began:6.1f} s", err=True)
    return found


def compare(before: dict[str, Digests], found: dict[str, Digests]) -> None:
    """Name what differs, and end with 1 where something does."""
    differing = [case for case in found if found[case] != before.get(case)]
    for case in differing:
        old, new = before.get(case, {}), found[case]
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        click.echo(f"differs: {case}: {', '.join(names)}")
    click.echo(f"{len(found) - len(differing)} of {len(found)} cases are equal")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()

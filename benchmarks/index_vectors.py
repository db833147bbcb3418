"""The vectors of the index benchmark: MiniLM's of WordNet's definitions, and as many more as are asked for, mixed of near ones.

    python benchmarks/index_vectors.py --rows 2000000

.tasks/index-base/passages.jsonl, questions.jsonl  lemmas with definition of every synset; usage examples, which no passage has
.tasks/index-base/passages/, questions/            their vectors, by jobs/embed_corpus.py
.tasks/index-vectors-N/part-*.parquet              N rows as embed_corpus.py leaves them: the passages first, then mixtures
.tasks/index-vectors-N/_made.json                   how they were made, and how the variance of both lies

A mixture is a passage's vector, moved by up to half of the way to one of its nearest, with noise, made of length 1 again.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.demo import minilm
from benchmarks.process import run_python
from tests.real.tasks import PLACE, WN8K, package, run_command

SPEECH = ("noun", "verb", "adj", "adv")
QUESTIONS, QUESTION_WORDS = 1000, 4  # how many, and the words each has at least
FILES = 20
GROUP_ROWS = 32_768
NEAR, MOST_WEIGHT, NOISE = 32, 0.5, 0.075  # neighbours, greatest share of one, length of the noise
COMPONENTS = (16, 64, 128)


@dataclass(frozen=True)
class Vectors:
    """Where they lie. texts: how many passages, all for None; anything but all is for trying things out."""

    rows: int
    texts: int | None = None
    seed: int = 0

    @property
    def base(self) -> Path:
        return PLACE / ("index-base" if self.texts is None else f"index-base-{self.texts}")

    @property
    def folder(self) -> Path:
        few = "" if self.texts is None else f"-of-{self.texts}"
        return PLACE / (f"index-vectors-{self.rows}{few}" + (f"-seed-{self.seed}" if self.seed else ""))

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    @property
    def made(self) -> dict[str, Any]:
        return json.loads((self.folder / "_made.json").read_text())

    def questions(self) -> np.ndarray:
        return column(pq.read_table(self.base / "questions")["embedding"])


# Texts


def read_wordnet(root: Path) -> tuple[dict[str, str], list[str]]:
    """Passages by synset, "lemma, lemma: definition", no two alike; and the usage examples, no two alike."""
    passages: dict[str, str] = {}  # synset by text
    examples: dict[str, None] = {}
    for speech in SPEECH:
        for line in (root / f"usr/share/wordnet/data.{speech}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition("|")
            offset, _, kind, count, *words = head.split()
            lemmas = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[: 2 * int(count, 16) : 2]]
            definition = " ".join(gloss.split('"')[0].split()).rstrip(" ;:,")
            passages.setdefault(f"{', '.join(lemmas)}: {definition}", f"{kind}{offset}")
            examples.update(dict.fromkeys(" ".join(text.split()) for text in re.findall(r'"([^"]+)"', gloss)))
    return {synset: text for text, synset in passages.items()}, list(examples)


def write_texts(vectors: Vectors) -> None:
    """Both files of texts; the questions are the examples with the least hashes."""
    with tempfile.TemporaryDirectory() as place:
        run_command("dpkg-deb", "-x", package(WN8K), place).check_returncode()
        found, examples = read_wordnet(Path(place))
    passages = list(found.items())
    if vectors.texts:
        places = np.linspace(0, len(passages) - 1, vectors.texts).round().astype(int)
        passages = [passages[each] for each in places]
    asked = sorted(
        (text for text in examples if len(text.split()) >= QUESTION_WORDS),
        key=lambda text: hashlib.sha256(text.encode()).hexdigest(),
    )[: min(QUESTIONS, len(passages))]
    write_rows(vectors.base / "passages.jsonl", passages)
    write_rows(vectors.base / "questions.jsonl", [(f"q{number:04}", text) for number, text in enumerate(asked)])


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in rows]
    path.with_suffix(".new").write_text("".join(lines), encoding="utf-8")
    path.with_suffix(".new").rename(path)


def embed(vectors: Vectors) -> None:
    """Vectors of both; what is there already is not embedded again."""
    for name in ("passages", "questions"):
        if not (vectors.base / f"{name}.jsonl").exists():
            write_texts(vectors)
        if not (vectors.base / name / "_manifest.parquet").exists():
            click.echo(f"embedding the {name}", err=True)
            line = ["jobs/embed_corpus.py", "--input", f"{vectors.base}/{name}.jsonl"]
            run_python(name, [*line, "--output", f"{vectors.base}/{name}", "--model", minilm()])


# Mixtures


def column(vectors: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """float32 [n, dim]."""
    array = vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)


def nearest(vectors: Vectors, base: np.ndarray) -> np.ndarray:
    """int32 [n, NEAR]: the passages nearest to each, itself not among them."""
    path = vectors.base / "nearest.npy"
    if not path.exists():
        import faiss

        _, found = faiss.knn(base, base, min(NEAR, len(base) - 1) + 1, metric=faiss.METRIC_INNER_PRODUCT)
        others = found != np.arange(len(base))[:, None]
        others[others.all(axis=1), -1] = False  # a passage with more twins than neighbours is not among its own
        np.save(path.with_suffix(".new.npy"), found[others].reshape(len(base), -1).astype(np.int32))
        path.with_suffix(".new.npy").rename(path)
    return np.load(path)


def mixed(base: np.ndarray, near: np.ndarray, first: int, count: int, seed: Sequence[int]) -> np.ndarray:
    """float32 [count, dim]: the rows from number `first` on. The first rows of all are the passages as they are."""
    random = np.random.default_rng(seed)
    own = random.integers(0, len(base), count)
    other = near[own, random.integers(0, near.shape[1], count)]
    weight = random.uniform(0, MOST_WEIGHT, (count, 1)).astype(np.float32)
    made = base[own]
    made += weight * (base[other] - made)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    made += random.standard_normal(made.shape, np.float32) * np.float32(NOISE / base.shape[1] ** 0.5)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    known = base[first : first + count]
    made[: len(known)] = known
    return made


def write_part(path: Path, first: int, vectors: np.ndarray, metadata: dict[bytes, bytes]) -> None:
    """A row's id is its number."""
    data = {
        "id": pa.array([f"{number:09}" for number in range(first, first + len(vectors))], pa.large_string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
        "error": pa.nulls(len(vectors), pa.string()),
    }
    table = pa.table(data).replace_schema_metadata({b"shoal": metadata[b"shoal"]})
    fresh = path.with_suffix(".new")
    leaf = "embedding.list.element"
    compression = {"id": "ZSTD", leaf: "NONE", "error": "ZSTD"}
    pq.write_table(table, fresh, row_group_size=GROUP_ROWS, compression=compression, use_dictionary=["id", "error"])
    fresh.rename(path)


def variance(blocks: Iterable[np.ndarray]) -> dict[str, float]:
    """The share of the variance that lies in the first principal components, by how many."""
    count, total, products = 0, 0.0, 0.0
    for block in blocks:
        count += len(block)
        total = total + block.sum(axis=0, dtype=np.float64)
        products = products + (block.T @ block).astype(np.float64)
    mean = total / count
    values = np.linalg.eigvalsh(products / count - np.outer(mean, mean))[::-1]
    return {str(most): float(values[:most].sum() / values.sum()) for most in COMPONENTS}


def blocks_of(files: Sequence[Path]) -> Iterator[np.ndarray]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(GROUP_ROWS, columns=["embedding"]):
                yield column(batch.column(0))


def prepare(vectors: Vectors) -> dict[str, Any]:
    """All that is not there yet; what _made.json says."""
    if (vectors.folder / "_made.json").exists():
        return vectors.made
    embed(vectors)
    table = pq.read_table(vectors.base / "passages", columns=["embedding"])
    base = column(table["embedding"])
    near = nearest(vectors, base)
    vectors.folder.mkdir(parents=True, exist_ok=True)
    firsts = np.linspace(0, vectors.rows, FILES + 1).round().astype(int).tolist()
    for number, (first, stop) in enumerate(pairwise(firsts)):
        path = vectors.folder / f"part-{number:06}.parquet"
        if not path.exists():
            write_part(
                path, first, mixed(base, near, first, stop - first, (vectors.seed, number)), table.schema.metadata
            )
            click.echo(f"{path.name} of {FILES}", err=True)
    starts = range(0, len(base), GROUP_ROWS)
    spectrum = {
        "passages": variance(base[start : start + GROUP_ROWS] for start in starts),
        "all": variance(blocks_of(vectors.files)),
    }
    made = {
        "rows": vectors.rows,
        "passages": len(base),
        "near": near.shape[1],
        "seed": vectors.seed,
        "variance": spectrum,
    }
    (vectors.folder / "_made.json").write_text(json.dumps(made, indent=1))
    return made


def told(made: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [
        f"{made['rows']:,} vectors of 384 dimensions: all-MiniLM-L6-v2's of {made['passages']:,} WordNet synsets (lemmas and "
        f"definition), then mixtures. A mixture is the vector of a synset drawn at random, moved towards one of its "
        f"{made['near']} nearest by a share even in 0 to {MOST_WEIGHT:g}, with Gaussian noise of length {NOISE:g}, made of "
        f"length 1; seed {made['seed']}",
    ]
    for name, shares in made["variance"].items():
        words = ", ".join(f"{share:.3f} in the first {most}" for most, share in shares.items())
        lines.append(f"variance of {name if name == 'all' else f'the {name}'}, by principal components: {words}")
    return lines


@click.command()
@click.option("--rows", default=2_000_000, show_default=True)
@click.option("--texts", type=int, help="Passages, evenly over WordNet. Default: all.")
@click.option("--seed", default=0, show_default=True)
def main(rows: int, texts: int | None, seed: int) -> None:
    """Make the vectors that are not there yet, and say what they are like."""
    click.echo("\n".join(told(prepare(Vectors(rows, texts, seed)))))


if __name__ == "__main__":
    sys.exit(main())

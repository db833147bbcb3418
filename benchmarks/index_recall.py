"""Recall of the index benchmark by plain numpy and faiss, which asks none of our code: questions, their true lists, what is found."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq

from benchmarks.index_vectors import Vectors, blocks_of
from lib.building.reading import matrix

CUT = 10  # recall@
LISTED = 101  # what the card's own measurement asks of a piece: of codes that are the same the lowest numbers win
RESAMPLES = 1000
Found = Mapping[str, np.ndarray]  # numbers, int64 [n, CUT] or more, -1 where there are fewer; by `{questions}-{probes}`


@dataclass(frozen=True)
class Questions:
    """By name, `held` out of the sample and `real` texts: vectors (in the .npz file `path`), the row that each leaves out,
    or -1, and the true lists."""

    path: Path
    asked: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    true: dict[str, np.ndarray]


def questions_of(output: Path, vectors: Vectors, folder: Path) -> Questions:
    """Those of a build; the true lists are computed where they are not in `folder` yet."""
    (file,) = (output / "_build").glob("queries-*/queries.parquet")
    table = pq.read_table(file)
    held, own, real = matrix(table["vector"]), table["number"].to_numpy(), vectors.questions()
    words = (vectors.folder.name.encode(), held.tobytes(), own.tobytes(), real.tobytes())
    path = folder / f"questions-{hashlib.sha256(b''.join(words)).hexdigest()[:12]}.npz"
    if not _truth(path).exists():
        click.echo("true lists, by numpy", err=True)
        owns = {"held": own, "real": np.full(len(real), -1, np.int64)}
        true = exact(vectors, np.concatenate([held, real]), np.concatenate(list(owns.values())))
        np.savez(path, held=held, real=real)
        np.savez(
            _truth(path), held=true[: len(held)], real=true[len(held) :], **{f"own {k}": v for k, v in owns.items()}
        )
    return load_questions(path)


def load_questions(path: Path) -> Questions:
    asked, true = dict(np.load(path)), dict(np.load(_truth(path)))
    return Questions(path, asked, {name: true[f"own {name}"] for name in asked}, {name: true[name] for name in asked})


def _truth(path: Path) -> Path:
    return path.with_name(f"true-{path.name}")


def exact(vectors: Vectors, asked: np.ndarray, own: np.ndarray) -> np.ndarray:
    """int64 [n, CUT]: the rows with the greatest products with each question, by float32 products of blocks."""
    scores, numbers = np.full((len(asked), CUT), -np.inf, np.float32), np.full((len(asked), CUT), -1, np.int64)
    first = 0
    for block in blocks_of(vectors.files):
        found = asked @ block.T
        here = np.flatnonzero((own >= first) & (own < first + len(block)))
        found[here, own[here] - first] = -np.inf
        best = np.argpartition(found, -min(CUT, len(block)), axis=1)[:, -CUT:]
        scores = np.concatenate([scores, np.take_along_axis(found, best, axis=1)], axis=1)
        numbers = np.concatenate([numbers, first + best], axis=1)
        kept = np.argsort(-scores, axis=1, kind="stable")[:, :CUT]
        scores, numbers = (np.take_along_axis(each, kept, axis=1) for each in (scores, numbers))
        first += len(block)
    return numbers


def search(pieces: Sequence[Path], questions: Questions, probes: Sequence[int]) -> Found:
    """What faiss finds in the pieces together. By l2 vectors of length 1 are ranked as by their products."""
    import faiss

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for piece in pieces:
        index = faiss.read_index(str(piece), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        for each in probes:
            faiss.ParameterSpace().set_index_parameter(index, "nprobe", each)
            for name, asked in questions.asked.items():
                scores, numbers = index.search(asked, LISTED)
                lists = found.setdefault(f"{name}-{each}", [])
                lists.append((-scores if index.metric_type == faiss.METRIC_L2 else scores, numbers))
    return {name: _best(lists, questions.own[name.split("-")[0]]) for name, lists in found.items()}


def _best(lists: Sequence[tuple[np.ndarray, np.ndarray]], own: np.ndarray) -> np.ndarray:
    """The first of all pieces' lists, scores and numbers each."""
    scores, numbers = (np.concatenate(each, axis=1) for each in zip(*lists, strict=True))
    out = (numbers < 0) | (numbers == own[:, None])
    scores, numbers = np.where(out, -np.inf, scores), np.where(out, -1, numbers)
    return np.take_along_axis(numbers, np.lexsort((numbers, -scores))[:, :CUT], axis=1)


def without_own(found: Found, questions: Questions) -> Found:
    """Lists without the row that the question is; CUT of each."""
    kept = {}
    for name, numbers in found.items():
        order = np.argsort(numbers == questions.own[name.split("-")[0]][:, None], axis=1, kind="stable")
        kept[name] = np.take_along_axis(numbers, order[:, :CUT], axis=1)
    return kept


def hits(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """float64 [n]: the share of each question's true list that was found."""
    counts = [len(np.intersect1d(mine[mine >= 0], row)) for mine, row in zip(found, true, strict=True)]
    return np.array(counts) / true.shape[1]


def recalls(found: Found, questions: Questions) -> dict[str, float]:
    return {name: float(hits(rows, questions.true[name.split("-")[0]]).mean()) for name, rows in found.items()}


def over(mine: Found, others: Found, questions: Questions) -> dict[str, list[float]]:
    """Recall of `mine` less that of the others, question by question: mean, and the ends of its 95 % interval."""
    random, told = np.random.default_rng(0), {}
    for name, rows in others.items():
        true = questions.true[name.split("-")[0]]
        apart = hits(mine[name], true) - hits(rows, true)
        means = apart[random.integers(0, len(apart), (RESAMPLES, len(apart)))].mean(axis=1)
        told[name] = [float(apart.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]
    return told

"""Recall of the index benchmark by plain numpy and faiss, which asks none of our code: questions, their true lists, what is found."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq

from benchmarks.index_vectors import Vectors, blocks_of
from lib.data.vectors import as_matrix

CUT = 10  # recall@
LISTED = 101  # what the card's own measurement takes of a segment: of codes that are the same the lowest numbers win
RESAMPLES = 1000
ROUNDING = 1e-6  # of products of vectors of length 1
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
    (file,) = (output / "_stages").glob("queries-*/queries.parquet")
    table = pq.read_table(file)
    held, own, real = as_matrix(table["vector"], np.float32), table["number"].to_numpy(), vectors.questions()
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


def search(segments: Sequence[Path], questions: Questions, probes: Sequence[int]) -> Found:
    """What faiss returns from the segments together. By l2 vectors of length 1 are ranked as by their products."""
    import faiss

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for segment in segments:
        index = faiss.read_index(str(segment), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        for each in probes:
            faiss.ParameterSpace().set_index_parameter(index, "nprobe", each)
            for name, asked in questions.asked.items():
                scores, numbers = index.search(asked, LISTED)
                lists = found.setdefault(f"{name}-{each}", [])
                lists.append((-scores if index.metric_type == faiss.METRIC_L2 else scores, numbers))
    return {name: _best(lists, questions.own[name.split("-")[0]]) for name, lists in found.items()}


def _best(lists: Sequence[tuple[np.ndarray, np.ndarray]], own: np.ndarray) -> np.ndarray:
    """The first of all segments' lists, scores and numbers each."""
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


def hits(found: Found, vectors: Vectors, questions: Questions) -> dict[str, np.ndarray]:
    """float64 [n] of each: the share of each question's list that is as near, by products in float64, as the last of its true list:
    of those that lie within what float32 rounds any is right."""
    told, scores = {}, _scores(found, vectors, questions)
    for name in found:
        least = scores[_true(name)].min(axis=1) - ROUNDING
        told[name] = (scores[name] >= least[:, None]).mean(axis=1)
    return told


def _true(name: str) -> str:
    return f"{name.split('-')[0]}-true"


def _scores(found: Found, vectors: Vectors, questions: Questions) -> dict[str, np.ndarray]:
    """float64 [n, CUT] each: products of the questions with what was found for them, and with their true lists. One pass over the
    files."""
    lists = dict(found) | {_true(name): true for name, true in questions.true.items()}
    numbers = np.unique(np.concatenate([rows.ravel() for rows in lists.values()]))
    numbers = numbers[numbers >= 0]
    held, first = [], 0
    for block in blocks_of(vectors.files):
        held.append(block[numbers[slice(*np.searchsorted(numbers, [first, first + len(block)]))] - first])
        first += len(block)
    there, told = np.concatenate(held), {}
    for name, rows in lists.items():
        asked, products = questions.asked[name.split("-")[0]].astype(np.float64), []
        for question, row in zip(asked, rows, strict=True):
            products.append(
                np.where(row >= 0, there[np.searchsorted(numbers, np.maximum(row, numbers[0]))] @ question, -np.inf)
            )
        told[name] = np.array(products)
    return told


def recalls(found: Found, vectors: Vectors, questions: Questions) -> dict[str, float]:
    return {name: float(shares.mean()) for name, shares in hits(found, vectors, questions).items()}


def over(mine: Found, others: Found, vectors: Vectors, questions: Questions) -> dict[str, list[float]]:
    """Recall of `mine` less that of the others, question by question: mean, and the ends of its 95 % interval."""
    random, told = np.random.default_rng(0), {}
    ours, theirs = (hits({name: each[name] for name in others}, vectors, questions) for each in (mine, others))
    for name in others:
        apart = ours[name] - theirs[name]
        means = apart[random.integers(0, len(apart), (RESAMPLES, len(apart)))].mean(axis=1)
        told[name] = [float(apart.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]
    return told

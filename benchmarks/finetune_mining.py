"""Hard negatives of wn-8k for a training: passages that the base model ranks high for a query and that do not answer it."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo import minilm
from tests.real import tasks

NEGATIVES, MARGIN = 7, 0.95
RANKS = 2, 30  # the best is 1; both are in
MINED_AT_ONCE = 1024  # queries

Row = dict[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    fresh.rename(path)


def read_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ranked(queries: list[str], passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places of all passages by the base model, best first: [queries, passages] each."""
    from lib.index.exact.topk import exact_top_k
    from lib.models.encoder import Encoder
    from lib.models.spec_reader import read_spec
    from lib.models.tokenizer import Tokenizer

    threads, spec = len(os.sched_getaffinity(0)), read_spec(minilm())
    encoder, tokenizer = Encoder(spec, dtype="float32", device="cpu", threads=threads), Tokenizer(spec)
    asked, held = (encoder.encode(tokenizer(texts)) for texts in (queries, passages))
    search, places = exact_top_k("cpu", threads), np.arange(len(held))
    starts = range(0, len(asked), MINED_AT_ONCE)
    found = [search(asked[start : start + MINED_AT_ONCE], held, places, len(held)) for start in starts]
    scores, order = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate([each.astype(np.int32) for each in order])


def candidates(scores: np.ndarray, places: np.ndarray, own: np.ndarray, filtered: bool) -> np.ndarray:
    """Places of the passages that may be a query's negatives. own: places of its positives.

    Ranks 2 to 30 of all passages; filtered, as many of those that are not over the ceiling, from rank 2 on.
    """
    mine = np.isin(places, own)
    first, last = RANKS
    if not filtered:
        window = slice(first - 1, last)
        return places[window][~mine[window]]
    fit = ~mine & (scores <= MARGIN * scores[mine].max())
    fit[: first - 1] = False
    return places[fit][: last - first + 1]


def mine(path_of: Callable[[str], Path], count: int | None) -> Row:
    """The files of pairs of `in-batch`, `hard` and `filtered`, at the paths of these names; what was found.

    count: of training queries; None for all.
    """
    began = time.perf_counter()
    folder = tasks.wn8k()
    pairs = tasks.training_pairs(folder)[:count]
    corpus = list(tasks.texts(folder / "corpus.jsonl").values())
    place = {text: number for number, text in enumerate(corpus)}
    scores, order = ranked([query for query, _ in pairs], corpus)
    told: Row = {"rows": len(pairs)}
    for name in ("hard", "filtered"):
        random, rows, short, emptied = np.random.default_rng(0), [], 0, 0
        for (query, good), of_query, ranks in zip(pairs, scores, order, strict=True):
            own = np.array([place[text] for text in good])
            found = candidates(of_query, ranks, own, name == "filtered")
            emptied += not np.isin(found, ranks[: RANKS[1]]).any()
            short += len(found) < NEGATIVES
            taken = random.permutation(found)[:NEGATIVES]
            rows.append({"query": query, "pos": good, "neg": [corpus[each] for each in taken]})
        write_rows(path_of(name), rows)
        told[f"{name}: rows with fewer than {NEGATIVES}"] = short
        told[f"{name}: rows without any of rank {RANKS[1]} or better"] = emptied
    write_rows(path_of("in-batch"), [{"query": query, "pos": good} for query, good in pairs])
    return told | {"seconds": time.perf_counter() - began}

"""What an index finds, held against what there is: exact search for the held vectors, and the pieces' own at each effort.

Both are maps over shards whose parts list the best of each query; where those are many, a map makes few of them, and the
driver goes through what is left with one list a query.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..indexes import Kind, Metric, scores_of, set_effort
from ..nearest import nearest
from ..plan import Shard
from ..scratch import Scratch
from ..stages import Bundle
from ..storage import Folder, download
from . import FACTS, NUMBER, VECTOR
from .coding import open_piece
from .reading import PATHS, OfParts, column, matrix, read_parts
from .source import Source

CUTS = 1, 10, 100
MOST = max(CUTS)
QUERIES = "queries.parquet"  # VECTOR and NUMBER: the row that is left out of a query's own list, or -1
NEAR = 0.005  # of the most recall there is: more effort for less is not advised
RESAMPLES = 1000  # of the queries, for intervals
PARTS_AT_ONCE = 64  # of lists, that become one
LISTED = ("effort", "query", NUMBER, "score")


@dataclass(frozen=True)
class Truth(OfParts):
    """The verb: of a shard's vectors the nearest to each query. firsts: the number of each shard's first row."""

    source: Source
    metric: Metric
    folder: Folder  # of QUERIES
    firsts: tuple[int, ...]
    threads: int

    def prepare(self, shard: Shard) -> tuple[Bundle, dict[str, float]]:
        began = time.perf_counter()
        rows = self.source.read(shard)
        places = np.flatnonzero(rows.good)
        table = pa.table({VECTOR: column(rows.vectors[places]), NUMBER: self.firsts[shard.number] + places})
        return {"rows": table}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Bundle], Bundle]:
        search = nearest("cpu", self.threads)
        queries = pq.read_table(pa.BufferReader(self.folder.read(QUERIES)))
        asked = as_products(matrix(queries[VECTOR]), self.metric, queries=True)

        def work(bundle: Bundle) -> Bundle:
            numbers = bundle["rows"][NUMBER].to_numpy()
            vectors = as_products(matrix(bundle["rows"][VECTOR]), self.metric, queries=False)
            scores, places = search(asked, vectors, np.arange(len(vectors)), MOST + 1)
            return {"rows": _lists(scores, numbers[places], effort=0)}

        return work


@dataclass(frozen=True)
class Probe(OfParts):
    """The verb: what a piece finds for each query at each effort, and the seconds that it takes, on one shard a piece."""

    kind: Kind
    metric: Metric
    efforts: tuple[int, ...]
    folder: Folder  # of QUERIES
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def worker(self) -> Callable[[Bundle], Bundle]:
        import faiss

        faiss.omp_set_num_threads(self.threads)
        queries = matrix(pq.read_table(pa.BufferReader(self.folder.read(QUERIES)))[VECTOR])

        def work(bundle: Bundle) -> Bundle:
            (path,) = bundle[PATHS]["path"].to_pylist()
            tables, seconds = [], {}
            with Scratch("probe") as place:
                index = open_piece(download(path, f"{place}/piece", self.storage))
                for effort in self.efforts:
                    set_effort(self.kind, index, effort)
                    began = time.perf_counter()
                    scores, numbers = index.search(queries, MOST + 1)
                    seconds[effort] = (time.perf_counter() - began) * self.threads
                    tables.append(_lists(scores_of(self.kind, self.metric, scores), numbers, effort))
            facts = json.dumps({"seconds": seconds})
            return {"rows": pa.concat_tables(tables).replace_schema_metadata({FACTS: facts})}

        return work


@dataclass(frozen=True)
class Shorten(OfParts):
    """The verb: of the lists in a shard's parts the best of each query and effort."""

    folder: Folder  # of QUERIES
    storage: Mapping[str, Any] = field(repr=False)

    def worker(self) -> Callable[[Bundle], Bundle]:
        own = pq.read_table(pa.BufferReader(self.folder.read(QUERIES)))[NUMBER].to_numpy()

        def work(bundle: Bundle) -> Bundle:
            best = best_lists(read_parts(bundle[PATHS], LISTED, self.storage), own)
            return {"rows": pa.concat_tables([_lists(*best[effort], effort) for effort in sorted(best)])}

        return work


def as_products(vectors: np.ndarray, metric: Metric, queries: bool) -> np.ndarray:
    """Vectors whose products are ranked as the metric ranks these: for l2 a dimension more, so that q x - |x|^2 / 2 counts."""
    if metric != "l2":
        return vectors
    last = np.ones(len(vectors)) if queries else -np.sum(vectors.astype(np.float64) ** 2, axis=1) / 2
    return np.concatenate([vectors, last[:, None].astype(np.float32)], axis=1)


def _lists(scores: np.ndarray, numbers: np.ndarray, effort: int) -> pa.Table:
    """Lists of [queries, n] each, as rows; faiss pads with the number -1 where it found fewer."""
    there = numbers >= 0
    query = np.broadcast_to(np.arange(len(scores), dtype=np.int32)[:, None], scores.shape)[there]
    data = {"effort": np.full(len(query), effort, np.int32), "query": query}
    return pa.table(data | {NUMBER: numbers[there], "score": scores[there]})


@dataclass(frozen=True)
class Measured:
    """Of one effort: recall@CUTS (mean, low, high of 95 %), and seconds of a core for a query over all pieces."""

    effort: int
    recall: Mapping[int, tuple[float, float, float]]
    seconds: float


Lists = tuple[np.ndarray, np.ndarray]  # scores, float32, and numbers, int64: [queries, MOST], -1 where there are fewer


def best_lists(tables: Iterable[pa.Table], own: np.ndarray) -> dict[int, Lists]:
    """By effort: the MOST best of each query over all tables.

    own: the number that a query's own list leaves out. Memory: a list a query and effort, and one table.
    """
    kept: dict[int, Lists] = {}
    for table in tables:
        efforts = table["effort"].to_numpy()
        for effort in np.unique(efforts).tolist():
            rows = table.filter(pa.array(efforts == effort))
            query, number, score = (rows[name].to_numpy() for name in ("query", NUMBER, "score"))
            mine = number != own[query]
            query, number, score = query[mine], number[mine], score[mine]
            if effort in kept:
                scores, numbers = kept[effort]
                place, rank = np.nonzero(numbers >= 0)
                query = np.concatenate([place, query])
                number = np.concatenate([numbers[place, rank], number])
                score = np.concatenate([scores[place, rank], score])
            kept[effort] = _best(query, number, score, len(own))
    return kept


def _best(query: np.ndarray, number: np.ndarray, score: np.ndarray, queries: int) -> Lists:
    order = np.lexsort((number, -score, query))
    query, number, score = query[order], number[order], score[order]
    starts = np.searchsorted(query, np.arange(queries))
    rank = np.arange(len(query)) - starts[query]
    top = rank < MOST
    scores, numbers = np.zeros((queries, MOST), np.float32), np.full((queries, MOST), -1, np.int64)
    scores[query[top], rank[top]], numbers[query[top], rank[top]] = score[top], number[top]
    return scores, numbers


def recall(found: np.ndarray, true: np.ndarray, cut: int) -> np.ndarray:
    """float64 [queries]: the share of each query's `cut` nearest that are among its first `cut` found; both lists of numbers."""
    wanted = true[:, :cut]
    hits = np.array([np.isin(row[row >= 0], mine[:cut]).sum() for row, mine in zip(wanted, found, strict=True)])
    return hits / np.maximum((wanted >= 0).sum(axis=1), 1)


def measured(found: Mapping[int, np.ndarray], true: np.ndarray, seconds: Mapping[int, float]) -> list[Measured]:
    """By effort, the least first. seconds: of a core for all queries, by effort."""
    random = np.random.default_rng(0).integers(0, len(true), (RESAMPLES, len(true)))
    rows = []
    for effort in sorted(found):
        values = {}
        for cut in CUTS:
            each = recall(found[effort], true, cut)
            low, high = np.quantile(each[random].mean(axis=1), [0.025, 0.975])
            values[cut] = (float(each.mean()), float(low), float(high))
        rows.append(Measured(effort, values, seconds[effort] / max(len(true), 1)))
    return rows


def enough(rows: Sequence[Measured], asked: float) -> Measured:
    """The least effort with that recall@10; where none has it, the least that comes near the most there is."""
    most = max(row.recall[10][0] for row in rows)
    least = asked if most >= asked else most - NEAR
    return next(row for row in rows if row.recall[10][0] >= least)

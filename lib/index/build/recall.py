"""What an index finds, held against what there is: the pieces' own search for the held vectors at each effort, and exact search.

Both are maps over shards whose parts list the best of each query; where those are many, a map makes few of them, and the
driver goes through what is left with one list a query. Exact search also scores what the pieces had found: of equal vectors one is
as good as another, whichever its number.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...data.bootstrap import bootstrap_interval
from ...data.shards import Shard
from ...engine.mapper import Tables
from ...storage.filesystem import download
from ...storage.folder import Folder
from ...storage.scratch import Scratch
from ..exact.topk import nearest
from ..kinds import IndexKind, Metric, scores_of, set_search_parameter
from .codec import open_segment
from .layout import FACTS, NUMBER, VECTOR
from .stage_parts import PATHS, OfParts, column, matrix, read_parts
from .vector_source import VectorSource

CUTS = 1, 10, 100
MOST = max(CUTS)
QUERIES = "queries.parquet"  # VECTOR and NUMBER: the row that is left out of a query's own list, or -1
PAIR = "pair"
SCORED = -1  # in place of an effort: exact scores of what the pieces found
ROUNDING = 1e-6  # of the sum of what is summed: as much may two sums of the same product differ, float32
NEAR = 0.005  # of the most recall there is: more effort for less is not advised
PAIRS_AT_ONCE = 4096  # whose vectors are gathered
PARTS_AT_ONCE = 64  # of lists, that become one
LISTED = ("effort", "query", NUMBER, "score")


@dataclass(frozen=True)
class GroundTruthMapper(OfParts):
    """The verb: of a shard's vectors the nearest to each query, and the scores of those that were found, with what rounding may
    have taken off. firsts: the number of each shard's first row. found: a file in `folder` of `query` and NUMBER, in its order."""

    source: VectorSource
    metric: Metric
    folder: Folder  # of QUERIES
    found: str
    firsts: tuple[int, ...]
    threads: int

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        began = time.perf_counter()
        rows = self.source.read(shard)
        places = np.flatnonzero(rows.good)
        table = pa.table({VECTOR: column(rows.vectors[places]), NUMBER: self.firsts[shard.number] + places})
        return {"rows": table}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        search = nearest("cpu", self.threads)
        queries = matrix(pq.read_table(pa.BufferReader(self.folder.read(QUERIES)))[VECTOR])
        middle = queries.mean(axis=0)
        asked = as_products(queries, middle, self.metric, queries=True)
        found = pq.read_table(pa.BufferReader(self.folder.read(self.found)))[PAIR].to_numpy()
        number, query = np.divmod(found, len(queries))

        def work(bundle: Tables) -> Tables:
            numbers = bundle["rows"][NUMBER].to_numpy()
            vectors = as_products(matrix(bundle["rows"][VECTOR]), middle, self.metric, queries=False)
            scores, places = search(asked, vectors, np.arange(len(vectors)), MOST + 1)
            here = slice(*np.searchsorted(number, [numbers[0], numbers[-1] + 1])) if len(numbers) else slice(0)
            score = _at_most(asked, query[here], vectors, np.searchsorted(numbers, number[here]))
            scored = {"effort": np.full(len(score), SCORED, np.int32), "query": query[here].astype(np.int32)}
            scored |= {NUMBER: number[here], "score": score}
            return {"rows": pa.concat_tables([_lists(scores, numbers[places], 0), pa.table(scored)])}

        return work


def _at_most(queries: np.ndarray, asked: np.ndarray, vectors: np.ndarray, held: np.ndarray) -> np.ndarray:
    """float32 [n]: the products of queries[asked] and vectors[held], as large as another sum of them may be."""
    found = [np.empty(0, np.float32)]
    for start in range(0, len(held), PAIRS_AT_ONCE):
        summed = queries[asked[start : start + PAIRS_AT_ONCE]] * vectors[held[start : start + PAIRS_AT_ONCE]]
        found.append(summed.sum(axis=1) + np.float32(ROUNDING) * np.abs(summed).sum(axis=1))
    return np.concatenate(found)


@dataclass(frozen=True)
class ProbeSegment(OfParts):
    """The verb: what a piece finds for each query at each effort, and the seconds that it takes, on one shard a piece."""

    kind: IndexKind
    metric: Metric
    efforts: tuple[int, ...]
    folder: Folder  # of QUERIES
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def worker(self) -> Callable[[Tables], Tables]:
        import faiss

        faiss.omp_set_num_threads(self.threads)
        queries = matrix(pq.read_table(pa.BufferReader(self.folder.read(QUERIES)))[VECTOR])

        def work(bundle: Tables) -> Tables:
            (path,) = bundle[PATHS]["path"].to_pylist()
            tables, seconds = [], {}
            with Scratch("probe") as place:
                index = open_segment(download(path, f"{place}/piece", self.storage))
                for effort in self.efforts:
                    set_search_parameter(self.kind, index, effort)
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

    def worker(self) -> Callable[[Tables], Tables]:
        own = pq.read_table(pa.BufferReader(self.folder.read(QUERIES)))[NUMBER].to_numpy()

        def work(bundle: Tables) -> Tables:
            best, scored = merge_top_k(read_parts(bundle[PATHS], LISTED, self.storage), own)
            return {"rows": pa.concat_tables([*(_lists(*best[effort], effort) for effort in sorted(best)), *scored])}

        return work


def as_products(vectors: np.ndarray, middle: np.ndarray, metric: Metric, queries: bool) -> np.ndarray:
    """Vectors whose products are ranked as the metric ranks these: for l2 a dimension more, so that q x - |x|^2 / 2 counts, of what
    lies about the queries' middle ([dim]), as far from it float32 would round the differences away."""
    if metric != "l2":
        return vectors
    vectors = vectors - middle
    last = np.ones(len(vectors)) if queries else -np.sum(vectors.astype(np.float64) ** 2, axis=1) / 2
    return np.concatenate([vectors, last[:, None].astype(np.float32)], axis=1)


def _lists(scores: np.ndarray, numbers: np.ndarray, effort: int) -> pa.Table:
    """Lists of [queries, n] each, as rows; faiss pads with the number -1 where it found fewer."""
    there = numbers >= 0
    query = np.broadcast_to(np.arange(len(scores), dtype=np.int32)[:, None], scores.shape)[there]
    data = {"effort": np.full(len(query), effort, np.int32), "query": query}
    return pa.table(data | {NUMBER: numbers[there], "score": scores[there]})


@dataclass(frozen=True)
class RecallPoint:
    """Of one effort: recall@CUTS (mean, low, high of 95 %), and seconds of a core for a query over all pieces."""

    effort: int
    recall: Mapping[int, tuple[float, float, float]]
    seconds: float


Lists = tuple[np.ndarray, np.ndarray]  # scores, float32, and numbers, int64: [queries, MOST], -1 where there are fewer


def merge_top_k(
    tables: Iterable[pa.Table], own: np.ndarray, wanted: np.ndarray | None = None
) -> tuple[dict[int, Lists], list[pa.Table]]:
    """By effort the MOST best of each query over all tables; and the rows of SCORED, of the wanted `pairs` or of all.

    own: the number that a query's own list leaves out. Memory: a list a query and effort, one table, and what is SCORED.
    """
    kept: dict[int, Lists] = {}
    scored: list[pa.Table] = []
    for table in tables:
        efforts = table["effort"].to_numpy()
        for effort in np.unique(efforts).tolist():
            rows = table.filter(pa.array(efforts == effort))
            if effort == SCORED:
                scored.append(rows if wanted is None else rows.filter(np.isin(_pairs_in(rows, len(own)), wanted)))
                continue
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
    return kept, scored


def _best(query: np.ndarray, number: np.ndarray, score: np.ndarray, queries: int) -> Lists:
    order = np.lexsort((number, -score, query))
    query, number, score = query[order], number[order], score[order]
    starts = np.searchsorted(query, np.arange(queries))
    rank = np.arange(len(query)) - starts[query]
    top = rank < MOST
    scores, numbers = np.zeros((queries, MOST), np.float32), np.full((queries, MOST), -1, np.int64)
    scores[query[top], rank[top]], numbers[query[top], rank[top]] = score[top], number[top]
    return scores, numbers


def pairs(found: Iterable[np.ndarray]) -> np.ndarray:
    """What lists of numbers (int64 [queries, n], -1 where there are fewer) have, each pair of a query and a number once: int64 [n],
    number * queries + query, in order."""
    keys = [np.empty(0, np.int64)]
    for numbers in found:
        query, rank = np.nonzero(numbers >= 0)
        keys.append(numbers[query, rank] * len(numbers) + query)
    return np.unique(np.concatenate(keys))


def _pairs_in(rows: pa.Table, queries: int) -> np.ndarray:
    return rows[NUMBER].to_numpy() * queries + rows["query"].to_numpy()


class ExactScores:
    """What there is: the scores of each query's nearest (float32 [queries, MOST], in order), and those of `pairs`. there: how many
    each query has, int64 [queries]."""

    def __init__(self, nearest: Lists, scored: Sequence[pa.Table]) -> None:
        self.scores, numbers = nearest
        self.there = (numbers >= 0).sum(axis=1)
        keys = np.concatenate([np.empty(0, np.int64), *(_pairs_in(table, len(numbers)) for table in scored)])
        score = np.concatenate([np.empty(0, np.float32), *(table["score"].to_numpy() for table in scored)])
        order = np.argsort(keys)
        self._pairs, self._score = keys[order], score[order]

    def recall(self, found: np.ndarray, cut: int) -> np.ndarray:
        """float64 [queries]: the share of the first `cut` found (numbers, int64 [queries, n], -1 where there are fewer) that are as
        near as the `cut`-th nearest: of those with the same score any. Raises RuntimeError for one that has no score."""
        wanted = np.minimum(self.there, cut)
        least = self.scores[np.arange(len(found)), np.maximum(wanted - 1, 0)]
        query, rank = np.nonzero(found[:, :cut] >= 0)
        pair = found[query, rank] * len(found) + query
        places = np.searchsorted(self._pairs, pair)
        if len(pair) and (places.max() >= len(self._pairs) or (self._pairs[places] != pair).any()):
            raise RuntimeError(
                "what the pieces found was not scored exactly. Delete _build of the index, and start the command again"
            )
        hits = np.bincount(query[self._score[places] >= least[query]], minlength=len(found))
        return np.minimum(hits, wanted) / np.maximum(wanted, 1)


def recall_points(found: Mapping[int, np.ndarray], exact: ExactScores, seconds: Mapping[int, float]) -> list[RecallPoint]:
    """By effort, the least first. seconds: of a core for all queries, by effort."""
    queries = len(exact.there)
    rows = []
    for effort in sorted(found):
        values = {}
        for cut in CUTS:
            each = exact.recall(found[effort], cut)
            low, high = bootstrap_interval(partial(_mean_of, each), queries)
            values[cut] = (float(each.mean()), float(low), float(high))
        rows.append(RecallPoint(effort, values, seconds[effort] / max(queries, 1)))
    return rows


def _mean_of(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean())


def advised_point(rows: Sequence[RecallPoint], asked: float) -> RecallPoint:
    """The least effort with that recall@10; where none has it, the least that comes near the most there is."""
    most = max(row.recall[10][0] for row in rows)
    least = asked if most >= asked else most - NEAR
    return next(row for row in rows if row.recall[10][0] >= least)

"""Exact search on one shard: a block of queries against a range of passages, all of it or the candidate pairs alone."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.ranking import rank_ids, top_k
from ...data.reader import as_one_array, read_rows
from ...data.shards import Shard, of_source
from ...data.vectors import as_matrix
from ...engine.mapper import FusedMapper, Result
from ...errors import InputError
from ...storage.filesystem import open_file
from ...storage.folder import Folder
from .topk import exact_top_k

QUERIES, PASSAGES = "queries", "passages"  # sources of a shard's ranges
QUERY_ID, PASSAGE_ID, SCORE = "query_id", "passage_id", "score"  # columns of a ranking
RANKING_SCHEMA = pa.schema([(QUERY_ID, pa.large_string()), (PASSAGE_ID, pa.large_string()), (SCORE, pa.float32())])
PAIRS_AT_ONCE = 65_536  # whose vectors are gathered


@dataclass(frozen=True)
class VectorReader:
    """Reads the vectors of a shard. cosine: scale vectors to length 1; else a score is the inner product as it is.

    columns: id, embedding, error. storage: fsspec options.
    """

    cosine: bool
    columns: pa.Schema
    storage: Mapping[str, Any] = field(repr=False)

    def read(self, shard: Shard) -> tuple["Vectors", "Vectors"]:
        """The queries and the passages."""
        return self._read(shard, QUERIES), self._read(shard, PASSAGES)

    def _read(self, shard: Shard, source: str) -> "Vectors":
        table = read_rows(of_source(shard, source), self.columns.names, self.columns, self.storage)
        if table["_error"].null_count < table.num_rows:
            reason = pc.drop_null(table["_error"])[0]
            raise RuntimeError(f"vectors of {source} cannot be read: {reason}")
        table = table.filter(pc.is_valid(table["embedding"]))
        vectors = as_matrix(table["embedding"], np.float32)
        if self.cosine:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if not np.isfinite(vectors).all():
            raise InputError(f"a vector of the {source} is not finite, so its scores are not numbers. Mend the vectors")
        return Vectors(as_one_array(table["id"]), vectors)


@dataclass(frozen=True)
class Vectors:
    """Rows that have a vector, in order. ids: large_string. vectors: float32 [n, dim]."""

    ids: pa.Array
    vectors: np.ndarray


@dataclass(frozen=True)
class ExactSearchMapper(FusedMapper):
    """A block of queries and a range of passages -> the k passages with the greatest scores of each query."""

    reader: VectorReader
    k: int
    threads: int
    device: str

    def load(self) -> Callable[[Shard], Result]:
        search = exact_top_k(self.device, self.threads)

        def work(shard: Shard) -> Result:
            began = time.perf_counter()
            queries, passages = self.reader.read(shard)
            seconds = {"read": time.perf_counter() - began}
            ranks, ids = rank_ids(passages.ids)
            scores, best = search(queries.vectors, passages.vectors, ranks, self.k)
            rows = np.repeat(np.arange(len(queries.ids)), scores.shape[1])
            return Result(_ranking(queries.ids, ids, rows, scores.reshape(-1), best.reshape(-1)), seconds=seconds)

        return work


@dataclass(frozen=True)
class ScoreCandidatesMapper(FusedMapper):
    """A block of queries and a range of passages -> the k best candidates of each query, of the pairs with both in the shard.

    candidates: the name of a Parquet file in `folder` with the columns QUERY_ID and PASSAGE_ID.
    """

    reader: VectorReader
    k: int
    folder: Folder
    candidates: str

    def load(self) -> Callable[[Shard], Result]:
        pairs = pq.read_table(pa.BufferReader(self.folder.read(self.candidates)))

        def work(shard: Shard) -> Result:
            began = time.perf_counter()
            queries, passages = self.reader.read(shard)
            seconds = {"read": time.perf_counter() - began}
            rows, places = _pairs_within(pairs, queries, passages)
            scores = np.empty(len(rows), np.float32)
            for start in range(0, len(rows), PAIRS_AT_ONCE):
                block = slice(start, start + PAIRS_AT_ONCE)
                scores[block] = np.einsum("nd,nd->n", queries.vectors[rows[block]], passages.vectors[places[block]])
            ranks, ids = rank_ids(passages.ids)
            return Result(_ranking(queries.ids, ids, *top_k(rows, scores, ranks[places], self.k)), seconds=seconds)

        return work


def _pairs_within(pairs: pa.Table, queries: Vectors, passages: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """The pairs with query and passage among these, as their places: int [n] both."""
    query = as_one_array(pc.index_in(pairs[QUERY_ID], value_set=queries.ids))
    passage = as_one_array(pc.index_in(pairs[PASSAGE_ID], value_set=passages.ids))
    both = pc.and_(pc.is_valid(query), pc.is_valid(passage))
    return query.filter(both).to_numpy(), passage.filter(both).to_numpy()


def read_ranking(path: str, storage: Mapping[str, Any]) -> pa.Table:
    """A part of rankings, as RANKING_SCHEMA types it."""
    with open_file(path, storage) as file:
        return pq.read_table(file, columns=RANKING_SCHEMA.names).cast(RANKING_SCHEMA)


def _ranking(queries: pa.Array, ids: pa.Array, rows: np.ndarray, scores: np.ndarray, ranks: np.ndarray) -> pa.Table:
    """Rows of a ranking. rows: places in `queries`. ranks: places in `ids`."""
    columns = {QUERY_ID: queries.take(pa.array(rows)), PASSAGE_ID: ids.take(pa.array(ranks)), SCORE: scores}
    return pa.table(columns).cast(RANKING_SCHEMA)

"""What exact search does with one shard: a block of queries against a range of passages, or the lists of several ranges."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.ranking import rank_ids, top_k
from ...data.reader import read_rows
from ...data.shards import Shard, of_source
from ...engine.mapper import Tables
from ...errors import InputError
from ...storage.filesystem import open_file
from ...storage.folder import Folder
from .topk import nearest

QUERIES, PASSAGES, CANDIDATES = "queries", "passages", "candidates"
QUERY_ID, PASSAGE_ID, SCORE = "query_id", "passage_id", "score"  # columns of a run
RUN_SCHEMA = pa.schema([(QUERY_ID, pa.large_string()), (PASSAGE_ID, pa.large_string()), (SCORE, pa.float32())])
PAIRS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Vectors:
    """How a shard's vectors are read. cosine: lengths do not count; else a score is the product as it is."""

    cosine: bool
    columns: pa.Schema  # id, embedding, error
    storage: Mapping[str, Any] = field(repr=False)

    def read(self, shard: Shard, source: str) -> pa.Table:
        """Columns `id` (large_string) and `vector` of the rows of one source that have a vector, in order."""
        table = read_rows(of_source(shard, source), self.columns.names, self.columns, self.storage)
        if table["_error"].null_count < table.num_rows:
            reason = pc.drop_null(table["_error"])[0]
            raise RuntimeError(f"vectors of {source} cannot be read: {reason}")
        table = table.filter(pc.is_valid(table["embedding"])).combine_chunks()
        vectors = matrix(table["embedding"])
        if self.cosine:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        if not np.isfinite(vectors).all():
            raise InputError(f"a vector of the {source} is not finite, so its scores are not numbers. Mend the vectors")
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), self.columns.field("embedding").type.list_size
        )
        return pa.table({"id": table["id"], "vector": column})


@dataclass(frozen=True)
class ExactSearchMapper:
    """The verb: the `most` nearest passages of each query of a shard."""

    vectors: Vectors
    most: int
    threads: int
    device: str

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        began = time.perf_counter()
        tables = {source: self.vectors.read(shard, source) for source in (QUERIES, PASSAGES)}
        return tables, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        search = nearest(self.device, self.threads)

        def work(bundle: Tables) -> Tables:
            queries, passages = bundle[QUERIES], bundle[PASSAGES]
            ranks, ids = rank_ids(passages["id"].combine_chunks())
            scores, places = search(matrix(queries["vector"]), matrix(passages["vector"]), ranks, self.most)
            rows = np.repeat(np.arange(len(queries)), scores.shape[1])
            return {"rows": _run(queries["id"], ids, rows, scores.reshape(-1), places.reshape(-1))}

        return work

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        return _counted(shard, bundle)


@dataclass(frozen=True)
class ScoreCandidatesMapper:
    """The verb: the score of each candidate pair whose query and passage are in a shard, the `most` best of each query."""

    vectors: Vectors
    most: int
    folder: Folder
    candidates: str  # Parquet in `folder`, columns QUERY_ID and PASSAGE_ID

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        began = time.perf_counter()
        tables = {source: self.vectors.read(shard, source) for source in (QUERIES, PASSAGES)}
        pairs = pq.read_table(pa.BufferReader(self.folder.read(self.candidates)))
        query = pc.index_in(pairs[QUERY_ID], value_set=tables[QUERIES]["id"].combine_chunks())
        passage = pc.index_in(pairs[PASSAGE_ID], value_set=tables[PASSAGES]["id"].combine_chunks())
        here = pc.and_(pc.is_valid(query), pc.is_valid(passage))
        tables[CANDIDATES] = pa.table({"query": query.filter(here), "passage": passage.filter(here)})
        return tables, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        return self._work

    def _work(self, bundle: Tables) -> Tables:
        queries, passages = matrix(bundle[QUERIES]["vector"]), matrix(bundle[PASSAGES]["vector"])
        rows, places = (bundle[CANDIDATES][name].to_numpy() for name in ("query", "passage"))
        scores = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), PAIRS_AT_ONCE):
            piece = slice(start, start + PAIRS_AT_ONCE)
            scores[piece] = np.einsum("nd,nd->n", queries[rows[piece]], passages[places[piece]])
        ranks, ids = rank_ids(bundle[PASSAGES]["id"].combine_chunks())
        return {"rows": _run(bundle[QUERIES]["id"], ids, *top_k(rows, scores, ranks[places], self.most))}

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        return _counted(shard, bundle)


@dataclass(frozen=True)
class Merge:
    """The verb: of the lists of several ranges for the same queries, the `most` best of each query. Its work is reading."""

    most: int
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Memory: two lists, whatever the number of ranges."""
        began = time.perf_counter()
        lists = (read_run(piece.path, self.storage) for piece in shard.ranges)
        merged = reduce(lambda left, right: _best_of(left, right, self.most), lists)
        return {"rows": merged}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        return lambda bundle: bundle

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        return _counted(shard, bundle)


def read_run(path: str, storage: Mapping[str, Any]) -> pa.Table:
    """A part of a run, as RUN_SCHEMA types it."""
    with open_file(path, storage) as file:
        return pq.read_table(file, columns=RUN_SCHEMA.names).cast(RUN_SCHEMA)


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors without nulls as float32 [n, dim]."""
    array = column.combine_chunks()
    flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return flat.reshape(len(array), array.type.list_size)


def _run(queries: Any, ids: Any, rows: np.ndarray, scores: np.ndarray, ranks: np.ndarray) -> pa.Table:
    """Rows of a run: queries and ids by their places in the two lists."""
    taken = {QUERY_ID: queries.take(pa.array(rows)), PASSAGE_ID: ids.take(pa.array(ranks)), SCORE: scores}
    return pa.table(taken).cast(RUN_SCHEMA)


def _best_of(left: pa.Table, right: pa.Table, most: int) -> pa.Table:
    """Of each query of two lists its `most` best."""
    rows = pa.concat_tables([left, right])
    numbered = rows[QUERY_ID].combine_chunks().dictionary_encode()
    ranks, ids = rank_ids(rows[PASSAGE_ID].combine_chunks())
    queries = numbered.indices.to_numpy().astype(np.int64)
    return _run(numbered.dictionary, ids, *top_k(queries, rows[SCORE].to_numpy(), ranks, most))


def _counted(shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
    return bundle["rows"], {"rows": bundle["rows"].num_rows, "source_rows": shard.rows}

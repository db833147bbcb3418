"""What a search of an index does with one shard: a block of queries in one piece, or the lists of all pieces for a block."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from socket import gethostname
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.shards import Shard, of_source
from ...engine.mapper import FusedMapper, Tables
from ...engine.parts import read_manifest
from ...errors import InputError
from ...storage.filesystem import download, open_file
from ...storage.folder import Folder
from ...storage.listing import current_tag
from ...storage.scratch import Scratch
from ..build.codec import open_segment
from ..build.stage_parts import column, ids_of, matrix
from ..build.vector_source import VectorSource
from ..exact.mappers import PASSAGE_ID, QUERY_ID, SCORE
from ..kinds import IndexKind, Metric, scores_of
from .hits import (
    FOUND_SCHEMA,
    NO_LISTS,
    PASSAGES_AT_ONCE,
    Lists,
    falling_short,
    ranked,
    side_by_side,
    table_of,
    without,
)

QUERIES, PIECES = "queries", "pieces"  # where a shard's slices come from
NOTHING = "nothing was found: no passage in the lists that were probed, or none that is allowed"


@dataclass(frozen=True)
class SearchSegment:
    """The verb: the `most` best of each query among a piece's vectors; a row with a reason for a query that has no vector.

    firsts: of each piece, by name, the number of its first row and how many it has. allowed: Parquet with the column `id` of
    the only passages to find, in `folder`, or None.
    """

    source: VectorSource
    kind: IndexKind
    metric: Metric
    effort: int
    most: int
    firsts: Mapping[str, tuple[int, int]]
    rows: Folder  # of the encoded rows, which have the ids
    folder: Folder
    allowed: str | None
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        began = time.perf_counter()
        rows, (piece,) = self.source.read(of_source(shard, QUERIES)), of_source(shard, PIECES).ranges
        queries = pa.table({"id": rows.table["id"], "vector": column(rows.vectors), "error": rows.reasons})
        return {"queries": queries, "piece": pa.table({"path": [piece.path]})}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        import faiss

        faiss.omp_set_num_threads(self.threads)
        opened = _Opened(self)

        def work(bundle: Tables) -> Tables:
            (path,) = bundle["piece"]["path"].to_pylist()
            name, queries = path.rpartition("/")[2], bundle["queries"]
            index = opened.index(path)
            good = pc.is_null(queries["error"]).combine_chunks()
            asked = queries.filter(good)
            rows, ids, scores = self._search(opened, name, index, np.ascontiguousarray(matrix(asked["vector"])))
            listed = table_of(asked["id"].combine_chunks(), rows, ids, scores)
            missed = np.setdiff1d(np.arange(len(asked)), rows)
            nothing = without(asked["id"].take(pa.array(missed)), pa.array([NOTHING] * len(missed), pa.string()))
            lacking = queries.filter(pc.invert(good))
            return {"rows": pa.concat_tables([listed, nothing, without(lacking["id"], lacking["error"])])}

        return work

    def _search(self, opened: "_Opened", name: str, index: Any, vectors: np.ndarray) -> Lists:
        """Where passages are several rows each, the queries that lack some are asked again, for more rows, until they have their
        `most` passages or all that are there."""
        found, wanted, most = [NO_LISTS], np.arange(len(vectors)), self.most
        while len(wanted):
            size, again = max(1, PASSAGES_AT_ONCE // most), []
            for places in (wanted[start : start + size] for start in range(0, len(wanted), size)):
                rows, ids, scores = self._nearest(opened, name, index, vectors[places], most)
                short = falling_short(rows, ids, len(places), most, self.most) & (most < index.ntotal)
                enough = ~short[rows]
                rows, ids, scores = ranked(rows[enough], ids.filter(pa.array(enough)), scores[enough], self.most)
                found.append((places[rows], ids, scores))
                again.append(places[short])
            wanted, most = np.concatenate(again), min(4 * most, index.ntotal)
        return side_by_side(found)

    def _nearest(self, opened: "_Opened", name: str, index: Any, vectors: np.ndarray, most: int) -> Lists:
        """The nearest rows of the piece, chunks of one passage each by itself."""
        scores, numbers = index.search(vectors, most, params=opened.parameters(name))
        there = numbers.reshape(-1) >= 0
        ids = opened.ids(name).take(pa.array(numbers.reshape(-1)[there] - self.firsts[name][0]))
        rows = np.repeat(np.arange(len(vectors)), most)[there]
        return rows, ids, scores_of(self.kind, self.metric, scores).reshape(-1)[there]

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        return _counted(shard, bundle)


class _Opened:
    """A worker's piece: its file, its ids, and what may be found in it. The last one is kept; a shard's next is mostly the same."""

    def __init__(self, verb: SearchSegment):
        self.verb = verb
        self.place = Scratch("search")
        self.parts = read_manifest(verb.rows)
        self.allowed = None
        if verb.allowed is not None:
            table = pq.read_table(pa.BufferReader(verb.folder.read(verb.allowed)))
            self.allowed = table["id"].combine_chunks()
        self.kept: dict[str, Any] = {}
        self.name = ""

    def _keep(self, name: str) -> dict[str, Any]:
        if name != self.name:
            self.kept, self.name = {}, name
        return self.kept

    def index(self, path: str) -> Any:
        kept = self._keep(path.rpartition("/")[2])
        if "index" not in kept:
            with _told(path):
                current_tag(path, self.verb.storage)  # faiss would say that it could not open it, and not why
                kept["index"] = open_segment(download(path, f"{self.place.name}/piece", self.verb.storage))
        return kept["index"]

    def ids(self, name: str) -> pa.Array:
        """large_string: of each row of a piece, those without a vector too."""
        kept = self._keep(name)
        if "ids" not in kept:
            first, count = self.verb.firsts[name]
            mine, start = [], 0
            for part in self.parts:
                if start < first + count and start + part.rows > first:
                    mine.append(part)
                start += part.rows
            with _told(self.verb.rows.url):
                kept["ids"] = ids_of(self.verb.rows, mine)
        return kept["ids"]

    def parameters(self, name: str) -> Any:
        """How faiss searches the piece."""
        import faiss

        kind, kept = self.verb.kind, self._keep(name)
        chosen: dict[str, Any] = {}
        if self.allowed is not None:
            if "allowed" not in kept:
                places = np.flatnonzero(pc.is_in(self.ids(name), value_set=self.allowed).to_numpy(zero_copy_only=False))
                kept["allowed"] = faiss.IDSelectorBatch(places + self.verb.firsts[name][0])
            chosen["sel"] = kept["allowed"]
        if kind.search_parameter:
            chosen[kind.search_parameter] = self.verb.effort
        return kind.parameters(**chosen)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Raises InputError for a file of the index that is not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename or url} is not there on the node {gethostname()}: start the command again that builds the index; or, "
            "where nodes do not share a file system, put the index into an object store"
        ) from error


@dataclass(frozen=True)
class Gather(FusedMapper):
    """The verb: of the lists of all pieces for the same queries, the `most` best of each query. Its work is reading."""

    most: int
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Memory: two lists, whatever the number of pieces."""
        began = time.perf_counter()
        lists = (self._read(piece.path) for piece in shard.ranges)
        return {"rows": reduce(self._best, lists)}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        return lambda bundle: bundle

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        return _counted(shard, bundle)

    def _read(self, path: str) -> pa.Table:
        with open_file(path, self.storage) as file:
            return pq.read_table(file).cast(FOUND_SCHEMA)

    def _best(self, left: pa.Table, right: pa.Table) -> pa.Table:
        rows = pa.concat_tables([left, right])
        listed, lacking = rows.filter(pc.is_null(rows["error"])), rows.filter(pc.is_valid(rows["error"]))
        numbered = listed[QUERY_ID].combine_chunks().dictionary_encode()
        queries = numbered.indices.to_numpy().astype(np.int64)
        passages, scores = listed[PASSAGE_ID].combine_chunks(), listed[SCORE].to_numpy()
        found = pc.is_in(lacking[QUERY_ID], value_set=numbered.dictionary)
        lacking = lacking.filter(pc.invert(found)).group_by(QUERY_ID, use_threads=False).aggregate([("error", "first")])
        listed = table_of(numbered.dictionary, *ranked(queries, passages, scores, self.most))
        return pa.concat_tables([listed, without(lacking[QUERY_ID], lacking["error_first"])])


def _counted(shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
    rows = bundle["rows"]
    return rows, {"rows": len(rows), "source_rows": shard.rows, "errors": len(rows) - rows["error"].null_count}

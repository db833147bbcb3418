"""The search job on one shard: a block of queries in one segment."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.shards import Shard, of_source
from ...engine.mapper import FusedMapper, Result
from ...storage.folder import Folder
from ..build.layout import ROWS
from ..build.vector_source import VectorRows, VectorSource
from ..kinds import IndexKind, Metric, scores_of
from .config import SearchConfig, search_value
from .hits import (
    ERROR,
    HITS_AT_ONCE,
    NO_HITS,
    Hits,
    best_hits,
    concat_hits,
    empty_table,
    hits_table,
    lacks_passages,
)
from .opened_index import OpenedIndex
from .segment_reader import Segment, SegmentReader, read_ids

QUERIES, SEGMENTS = "queries", "segments"  # sources of a shard's ranges
NO_PASSAGE = "nothing was found: no passage in the lists that were probed, or none that is allowed"


@dataclass(frozen=True)
class SearchSegment(FusedMapper):
    """A block of queries and a segment -> the k best passages of each query; a row with the reason for a query without any.

    value: of the kind's search parameter. ranges: by a segment's name, the number of its first row and its rows. rows: folder of the
    encoded rows. output: folder with the file `allowed`, the ids that a search may return; None for all.
    """

    queries: VectorSource
    kind: IndexKind
    metric: Metric
    value: int
    k: int
    ranges: Mapping[str, tuple[int, int]]
    rows: Folder
    output: Folder
    allowed: str | None
    threads: int

    @classmethod
    def of(
        cls, index: OpenedIndex, config: SearchConfig, *, queries: VectorSource, allowed: str | None, threads: int
    ) -> "SearchSegment":
        """The mapper for the segments of an opened index."""
        return cls(
            queries=queries,
            kind=index.kind,
            metric=index.card["metric"],
            value=search_value(config, index.card, index.kind),
            k=config.top_k,
            ranges={segment["name"]: (segment["first"], segment["rows"]) for segment in index.segments},
            rows=index.folder.below(ROWS),
            output=config.hits_folder,
            allowed=allowed,
            threads=threads,
        )

    def load(self) -> Callable[[Shard], Result]:
        import faiss

        faiss.omp_set_num_threads(self.threads)
        allowed = None if self.allowed is None else read_ids(self.output, self.allowed)
        reader = SegmentReader(self.ranges, self.rows, allowed)

        def work(shard: Shard) -> Result:
            began = time.perf_counter()
            queries = self.queries.read(of_source(shard, QUERIES))
            seconds = {"read": time.perf_counter() - began}
            (file,) = of_source(shard, SEGMENTS).ranges
            table = self._table(reader.open(file.path), queries)
            return Result(table, {"errors": len(table) - table[ERROR].null_count}, seconds=seconds)

        return work

    def _table(self, segment: Segment, queries: VectorRows) -> pa.Table:
        """Hits; then a row for each query without a passage; then a row for each query without a vector."""
        valid = pa.array(queries.valid)
        names = queries.table["id"].combine_chunks()
        with_vector, without = names.filter(valid), pc.invert(valid)
        hits = self._search(segment, np.ascontiguousarray(queries.valid_vectors))
        missed = np.setdiff1d(np.arange(len(with_vector)), hits[0])
        reasons = pa.array([NO_PASSAGE] * len(missed), pa.string())
        return pa.concat_tables(
            [
                hits_table(with_vector, *hits),
                empty_table(with_vector.take(pa.array(missed)), reasons),
                empty_table(names.filter(without), queries.reasons.filter(without)),
            ]
        )

    def _search(self, segment: Segment, vectors: np.ndarray) -> Hits:
        """Search for k rows a query. Where passages are several rows each, search again for more rows, only for the queries that lack
        passages, until each has k of them or all that the segment has."""
        hits, lacking, rows = [NO_HITS], np.arange(len(vectors)), self.k
        while len(lacking):
            block, again = max(1, HITS_AT_ONCE // rows), []
            for places in (lacking[start : start + block] for start in range(0, len(lacking), block)):
                queries, ids, scores = self._nearest_rows(segment, vectors[places], rows)
                short = lacks_passages(queries, ids, len(places), rows, self.k) & (rows < segment.index.ntotal)
                enough = ~short[queries]
                best = best_hits(queries[enough], ids.filter(pa.array(enough)), scores[enough], self.k)
                hits.append((places[best[0]], *best[1:]))
                again.append(places[short])
            lacking, rows = np.concatenate(again), min(4 * rows, segment.index.ntotal)
        return concat_hits(hits)

    def _nearest_rows(self, segment: Segment, vectors: np.ndarray, count: int) -> Hits:
        """The nearest rows of the segment, chunks of one passage each by itself."""
        scores, numbers = segment.index.search(vectors, count, params=self._parameters(segment))
        exists = numbers.reshape(-1) >= 0  # faiss pads with -1
        ids = segment.ids.take(pa.array(numbers.reshape(-1)[exists] - segment.first))
        queries = np.repeat(np.arange(len(vectors)), count)[exists]
        return queries, ids, scores_of(self.kind, self.metric, scores).reshape(-1)[exists]

    def _parameters(self, segment: Segment) -> Any:
        """faiss's parameters of a search."""
        chosen: dict[str, Any] = {} if segment.selector is None else {"sel": segment.selector}
        if self.kind.search_parameter:
            chosen[self.kind.search_parameter] = self.value
        return self.kind.parameters(**chosen)

"""Sources of pairs: rows with both texts, or buckets of candidates and queries that a join has made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from ..data.reader import read_rows, row_ids
from ..data.shards import Shard
from ..data.texts import compose
from ..engine.join import read_sources
from ..engine.shuffle import KEY, REASON, attach

PAIR = ("query", "passage")  # the columns of texts


class PairSource(Protocol):
    """A reader of the texts of a shard's pairs."""

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        """Columns `query` and `passage` (large_string, null where there is none), KEY (equal for pairs of one query),
        REASON, and those of the output. And how many of the plan's rows were read."""
        ...


@dataclass(frozen=True)
class PairRows:
    """Pairs whose rows hold both texts."""

    query_column: str
    template: tuple[tuple[str, str | None], ...]
    id_column: str | None
    carried: tuple[str, ...]
    columns: pa.Schema
    storage: Mapping[str, Any]

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        names = [self.query_column, *(name for _, name in self.template), self.id_column, *self.carried]
        table = read_rows(shard, names, self.columns, self.storage)
        query, no_query = compose(table, [("", self.query_column)])
        passage, no_passage = compose(table, self.template)
        data = {"id": row_ids(table, self.id_column)} | {name: table[name] for name in self.carried}
        reasons = pc.coalesce(table["_error"], _about("query", no_query), _about("passage", no_passage))
        texts = {"query": query, "passage": passage, KEY: query, REASON: reasons}
        return pa.table(data | texts), table.num_rows


@dataclass(frozen=True)
class CandidateRows:
    """A bucket of candidates that have their passages, and of queries: the pairs of a query are side by side."""

    candidates: str
    queries: str
    columns: pa.Schema
    storage: Mapping[str, Any]

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        left, right = read_sources(shard, self.candidates, self.queries, self.columns, self.storage)
        pairs = attach(left, right, "query")
        order = pc.sort_indices(pairs, [(KEY, "ascending")])  # stable
        return pairs.take(order), shard.rows


def _about(side: str, reasons: pa.Array) -> pa.Array:
    """The reasons with the side that they are about, as 'query: null text'."""
    return pc.binary_join_element_wise(pa.scalar(f"{side}: "), reasons, pa.scalar(""))

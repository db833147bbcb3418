"""Merging of ranked lists: from the parts of a shard, the best rows of each query.

A list is a table with a row for each query and item. Exact search, the search of an index and the measurement of recall all search
part by part, and their lists are merged here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.ranking import best_of_repeats, rank_ids, top_k
from ...data.reader import as_one_array
from ...data.shards import Shard
from ...engine.mapper import FusedMapper, Result
from ...storage.filesystem import open_file


@dataclass(frozen=True)
class RankedLists:
    """The columns of lists, and the length that they are cut to.

    query: the columns that name a query together. item: passage ids (of equal scores the highest id comes first, as in trec_eval),
    or row numbers (the lowest first). score: null marks a row that carries only the reason why its query has no item; reasons: the
    columns of such rows.
    """

    query: tuple[str, ...]
    item: str
    k: int
    score: str = "score"
    reasons: tuple[str, ...] = ()

    def merge(self, tables: Iterator[pa.Table]) -> pa.Table:
        """The k best rows of each query over all tables. Memory: two tables."""
        return reduce(lambda left, right: self.best(pa.concat_tables([left, right])), tables, self.best(next(tables)))

    def best(self, table: pa.Table) -> pa.Table:
        """The k best rows of each query, each item once; and the first row of a query without any item."""
        has_score = as_one_array(pc.is_valid(table[self.score]))
        rows, empty = table.filter(has_score), table.filter(pc.invert(has_score))
        numbers, firsts = _numbered(rows.select(self.query))
        ranks, items = _ranked_items(as_one_array(rows[self.item]))
        repeats = best_of_repeats(numbers, rows[self.score].to_numpy(), ranks)
        queries, scores, ranks = top_k(*repeats, self.k)
        best = rows.select(self.query).take(pa.array(firsts[queries]))
        best = best.append_column(self.item, items.take(pa.array(ranks))).append_column(self.score, pa.array(scores))
        for name in self.reasons:
            best = best.append_column(name, pa.nulls(len(best), table.schema.field(name).type))
        return pa.concat_tables([best, _without(empty, rows, self.query).select(best.column_names)])

    @property
    def columns(self) -> list[str]:
        return [*self.query, self.item, self.score, *self.reasons]


@dataclass(frozen=True)
class TopKMerge(FusedMapper):
    """The parts of a shard -> the best rows of each query in them."""

    lists: RankedLists
    storage: Mapping[str, Any] = field(repr=False)

    def load(self) -> Callable[[Shard], Result]:
        return self._merge

    def _merge(self, shard: Shard) -> Result:
        table = self.lists.merge(self._read(each.path) for each in shard.ranges)
        return Result(table, {"errors": table[self.lists.score].null_count})

    def _read(self, path: str) -> pa.Table:
        with open_file(path, self.storage) as file:
            return pq.read_table(file, columns=self.lists.columns).replace_schema_metadata()


def _numbered(queries: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """A number of each row's query, int64 [n], in the order in which queries appear; and the first row of each, int64 [queries]."""
    numbers = np.zeros(len(queries), np.int64)
    for column in queries.columns:
        encoded = as_one_array(column).dictionary_encode()
        numbers = numbers * len(encoded.dictionary) + encoded.indices.to_numpy()
    encoded = pa.array(numbers).dictionary_encode()  # by hashing: a sort takes ten times as long
    places = encoded.indices.to_numpy().astype(np.int64)
    firsts = np.empty(len(encoded.dictionary), np.int64)
    firsts[places[::-1]] = np.arange(len(places))[::-1]  # the last write is of the first row
    return places, firsts


def _ranked_items(items: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Ranks of items, int64 [n], of which the greater one is first among equal scores; and the items by rank."""
    if not pa.types.is_integer(items.type):
        return rank_ids(items)
    unique, places = np.unique(items.to_numpy(), return_inverse=True)
    return len(unique) - 1 - places, pa.array(unique[::-1])


def _without(empty: pa.Table, rows: pa.Table, query: tuple[str, ...]) -> pa.Table:
    """The first row of each query in `empty` that has no row in `rows`."""
    if not len(empty):
        return empty
    _, firsts = _numbered(pa.concat_tables([rows.select(query), empty.select(query)]))
    return empty.take(pa.array(firsts[firsts >= len(rows)] - len(rows)))

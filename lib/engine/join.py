"""Mappers that partition tables by a key and join them bucket by bucket: see shuffle.py. Their work is in the workers, on CPUs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..data.reader import read_rows
from ..data.shards import Shard, of_source
from ..data.texts import as_text, compose
from .mapper import FusedMapper, Result
from .shuffle import KEY, REASON, TEXT, attach, partition


@dataclass(frozen=True)
class PartitionMapper(FusedMapper):
    """A table's rows, partitioned by a column: KEY, REASON, and the carried columns; with a template also TEXT."""

    key: str
    carried: tuple[str, ...]
    template: tuple[tuple[str, str | None], ...]
    buckets: int
    columns: pa.Schema
    storage: Mapping[str, Any]

    def load(self) -> Callable[[Shard], Result]:
        return self._partition

    def _partition(self, shard: Shard) -> Result:
        began = time.perf_counter()
        names = dict.fromkeys([self.key, *self.carried, *(name for _, name in self.template if name)])
        table = read_rows(shard, list(names), self.columns, self.storage)
        seconds = time.perf_counter() - began
        keys, broken = as_key(table[self.key])
        absent = pc.if_else(pc.is_null(keys), f"null {self.key}", pa.scalar(None, pa.string()))
        data: dict[str, Any] = {KEY: keys}
        reasons = [table["_error"].combine_chunks(), broken, absent]
        if self.template:
            data[TEXT], unfit = compose(table, self.template)
            reasons.append(unfit)
        data |= {name: table[name] for name in self.carried}
        data[REASON] = pc.coalesce(*reasons)
        return _partitioned(pa.table(data), self.buckets, table.num_rows, seconds)


@dataclass(frozen=True)
class JoinMapper(FusedMapper):
    """Buckets of the sources `left` and `right`: left rows with the text of their key, partitioned again by another column."""

    left: str
    right: str
    name: str  # of the new column
    key: str  # column of the next partitioning
    buckets: int
    columns: pa.Schema
    storage: Mapping[str, Any]

    def load(self) -> Callable[[Shard], Result]:
        return self._join

    def _join(self, shard: Shard) -> Result:
        began = time.perf_counter()
        left, right = read_sources(shard, self.left, self.right, self.columns, self.storage)
        seconds = time.perf_counter() - began
        joined = attach(left, right, self.name)
        keys, _ = as_key(joined[self.key])
        joined = joined.set_column(joined.schema.get_field_index(KEY), KEY, keys)
        return _partitioned(joined, self.buckets, shard.rows, seconds)


def read_sources(
    shard: Shard, left: str, right: str, columns: pa.Schema, storage: Mapping[str, Any]
) -> tuple[pa.Table, pa.Table]:
    """A bucket's rows of both sources; those of texts have KEY, TEXT and REASON only.

    Raises RuntimeError for a part that cannot be read whole: it is one of ours, and is tried again.
    """
    others = [name for name in columns.names if name != TEXT]
    tables = []
    for source, names in ((left, others), (right, [KEY, TEXT, REASON])):
        own = of_source(shard, source)
        table = read_rows(own, names, columns, storage)
        if table["_error"].null_count < table.num_rows or table.num_rows != own.rows:
            raise RuntimeError(f"parts of {source} cannot be read whole: {pc.drop_null(table['_error'])[:1]}")
        tables.append(table.drop_columns(["_source", "_error"]))
    return tables[0], tables[1]


def as_key(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Ids as text, and reasons: see as_text. Whole numbers read the same from integers and from floats, which a column of integers
    with a null becomes in many hands."""
    if pa.types.is_floating(column.type) and pc.all(pc.equal(pc.floor(column), column)).as_py() is not False:
        column = column.cast(pa.int64())
    return as_text(column)


def _partitioned(table: pa.Table, buckets: int, source_rows: int, read_seconds: float) -> Result:
    table, groups = partition(table, buckets)
    counts = {"source_rows": source_rows, "errors": table.num_rows - table[REASON].null_count}
    return Result(table, counts, groups=groups, seconds={"read": read_seconds})

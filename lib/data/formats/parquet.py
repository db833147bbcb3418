"""Parquet, cut by rows: at a border of row groups where one is near, else inside a long row group."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...storage.filesystem import open_file
from ...storage.listing import InputFile
from ...storage.retry import is_damage
from . import Measure, error_table

SUFFIXES = (".parquet", ".pq")
SCHEMALESS = False
ROWS_PER_TABLE = 8192  # decoded at once
BUFFER = 4 << 20  # bytes read ahead a column: memory then does not grow with the row group


def measure(file: InputFile, columns: Sequence[str], options: Mapping[str, Any]) -> Measure:
    with open_file(file.path, options) as source, pq.ParquetFile(source) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size = sum(_group_bytes(group, columns) for group in groups)
    breaks = tuple(accumulate(group.num_rows for group in groups))
    rows = metadata.num_rows
    return Measure(rows, 1.0, True, max(1.0, size / max(rows, 1)), schema.remove_metadata(), breaks=breaks)


def read(path: str, start: int, stop: int, columns: Sequence[str], options: Mapping[str, Any]) -> Iterator[pa.Table]:
    # Unless pre_buffer is off pyarrow ignores the buffer, and reads a row group's columns whole before the first row.
    with open_file(path, options) as source, pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False) as parquet:
        columns = [name for name in columns if name in parquet.schema_arrow.names]
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            last = first + parquet.metadata.row_group(group).num_rows
            if first < stop and last > start:
                yield from _read_group(parquet, group, max(start, first), min(stop, last), first, columns)
            first = last


def _read_group(
    parquet: pq.ParquetFile, group: int, start: int, stop: int, first: int, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Read rows [start, stop) of the file, all within `group`, which begins at row `first`."""
    done = start
    try:
        position = first
        at_once = min(ROWS_PER_TABLE, stop - first)  # nothing behind a short range is decoded
        for batch in parquet.iter_batches(at_once, row_groups=[group], columns=list(columns), use_threads=False):
            begin, end = max(start, position), min(stop, position + len(batch))
            if begin < end:
                yield _table(pa.Table.from_batches([batch]).slice(begin - position, end - begin), begin)
                done = end
            position += len(batch)
            if position >= stop:
                return
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise  # the disk or the network failed: the shard is retried
        yield error_table(stop - done, f"unreadable row group {group}: {str(error)[:200]}", columns, done)


def _table(table: pa.Table, first: int) -> pa.Table:
    rows = table.num_rows
    table = table.append_column("_position", pa.array(range(first, first + rows), pa.int64()))
    return table.append_column("_error", pa.nulls(rows, pa.string()))


def _group_bytes(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """Uncompressed bytes of the columns in a row group."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)

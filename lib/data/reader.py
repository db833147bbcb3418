"""The rows of a shard: read from its files, typed as in the plan, each with a name, and with a reason if it is bad."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from socket import gethostname
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from ..storage.listing import current_tag
from .columns import hive_keys
from .formats import check_columns, error_table, format_of
from .shards import FileRange, Shard
from .texts import as_text


def read_rows(shard: Shard, columns: Iterable[str | None], schema: pa.Schema, storage: Mapping[str, Any]) -> pa.Table:
    """Read all rows of a shard: the columns with the types of `schema`, `_source` (FILE#POSITION) and `_error`.

    columns: one may come more than once, or be None, for none. Raises InputError when a file has changed since the plan.
    """
    names = [name for name in dict.fromkeys(columns) if name]
    ends = [pa.field("_source", pa.string()), pa.field("_error", pa.string())]
    none = pa.schema([*map(schema.field, names), *ends]).empty_table()
    return pa.concat_tables([*batches(shard, names, schema, storage), none]).combine_chunks()


def batches(shard: Shard, columns: Sequence[str], schema: pa.Schema, storage: Mapping[str, Any]) -> Iterator[pa.Table]:
    """Read the same, some rows at a time, in order."""
    for part in shard.ranges:
        yield from _read_range(part, columns, schema, storage)


def row_ids(table: pa.Table, id_column: str | None) -> pa.Array | pa.ChunkedArray:
    """The id of each row of `read_rows`: that of the column, text as UTF-8; without a column FILE#POSITION."""
    if id_column is None:
        return table["_source"]
    column = table[id_column]
    return as_text(column)[0] if pa.types.is_large_string(column.type) else column


def first_with_reason(reasons: pa.Array | pa.ChunkedArray) -> int | None:
    """The number of the first row that has a reason; None where none has."""
    return pc.index(pc.is_valid(reasons), True).as_py() if reasons.null_count < len(reasons) else None


def as_one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array; not copied where it is one already, as combine_chunks does."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _read_range(
    part: FileRange, columns: Sequence[str], schema: pa.Schema, storage: Mapping[str, Any]
) -> Iterator[pa.Table]:
    name = part.name
    if part.error is not None:
        yield _typed(error_table(1, part.error, columns), columns, schema, name)
        return
    try:
        now = current_tag(part.path, storage)
    except FileNotFoundError as error:
        raise InputError(
            f"{part.path} is not there on the node {gethostname()}. It was planned: restore it; or, where nodes do not "
            "share a file system, put the input into an object store"
        ) from error
    if now != (part.size, part.tag or now[1]):
        raise InputError(f"{part.path} has changed since the plan. Restore it, or choose a new --output")
    format = format_of(part.path)
    assert format is not None, part.path
    # A file without a tag is a part of ours: the folders above it are the user's output, and no columns.
    keys = {key: value for key, value in hive_keys(part.name).items() if key in columns and part.tag}
    for table in format.read(part.path, part.start, part.stop, columns, storage):
        for key, value in keys.items():
            table = _with_folder_column(table, key, value, format.SCHEMALESS)
        check_columns(table.schema, columns, part.path)
        yield _typed(table, columns, schema, name)


def _with_folder_column(table: pa.Table, key: str, value: str | None, schemaless: bool) -> pa.Table:
    """The table with the column of a hive folder, where the file, or a row of a schemaless one, has no value of its own."""
    if key not in table.column_names:
        return table.append_column(key, pa.array([value] * table.num_rows, pa.string()))
    if not schemaless:
        return table
    filled = pc.coalesce(table[key], pa.scalar(value, pa.large_string()))
    return table.set_column(table.schema.get_field_index(key), key, filled)


def _typed(table: pa.Table, columns: Sequence[str], schema: pa.Schema, name: str) -> pa.Table:
    """The columns with the types of the plan; a value that does not fit is null with a reason."""
    data: dict[str, Any] = {}
    errors = table["_error"]
    for column in columns:
        target = schema.field(column).type
        try:
            data[column] = table[column].cast(target)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            data[column], unfit = _cast_each(table[column], target)
            errors = pc.coalesce(
                errors, pc.if_else(unfit, f"column {column!r} is not {target}", None).cast(pa.string())
            )
    prefix = pa.array([f"{name}#"] * table.num_rows, pa.string())
    data["_source"] = pc.binary_join_element_wise(prefix, table["_position"].cast(pa.string()), "")
    return pa.table(data | {"_error": errors})


def _cast_each(column: pa.ChunkedArray, target: pa.DataType) -> tuple[pa.Array, pa.Array]:
    """The column value by value, null where a value does not fit, and a bool array of those places."""
    values, unfit = [], []
    for value in column:
        try:
            values.append(value.cast(target).as_py())
            unfit.append(False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            values.append(None)
            unfit.append(True)
    return pa.array(values, target), pa.array(unfit)

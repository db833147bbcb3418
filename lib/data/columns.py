"""The columns of a corpus: of the types that hold the values of all its files, of hive folders, of lines far down in a file."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from ..errors import InputError
from ..storage.listing import InputFile
from .formats import Measure, format_of

LATE_BYTES = 1 << 30  # read of an input to find a column that the beginnings of its files lack: seconds
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"  # a null, as Hive and Spark write it


def merged_schema(
    files: Sequence[InputFile], measures: Sequence[Measure | str], wanted: Sequence[str] = ()
) -> pa.Schema:
    """Columns of every readable file, each of a type that holds the values of all files, and then columns of folders.

    Raises InputError for a wanted column whose types have nothing in common. Of any other the first file's type stands.
    """
    fields: dict[str, pa.Field] = {}
    first: dict[str, InputFile] = {}
    for file, measure in zip(files, measures, strict=True):
        for column in measure.schema if isinstance(measure, Measure) else ():
            known = fields.setdefault(column.name, column)
            began = first.setdefault(column.name, file)
            wider = common_type(known.type, column.type)
            if wider is not None:
                fields[column.name] = known.with_type(wider)
            elif column.name in wanted:
                raise InputError(
                    f"column {column.name!r} is {known.type} in {began.path} and {column.type} in {file.path}, which have no "
                    "common type. Write one of them anew, or give the files to runs of their own"
                )
    schema = pa.schema(list(fields.values()))
    for file in files:
        schema = with_hive(schema, file.name)
    return schema


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both, or None. Beside text, which JSON Lines and CSV give, anything is text.

    pandas writes a column of nulls as type null, which is the type of no other file.
    """
    if one == other:
        return one
    one, other = (t.value_type if pa.types.is_dictionary(t) else t for t in (one, other))
    if one == other:
        return one
    unsigned = pa.uint64() in (one, other) and any(map(pa.types.is_signed_integer, (one, other)))
    flat = not any(map(pa.types.is_nested, (one, other))) and not any(map(pa.types.is_null, (one, other)))
    binary = any(map(_is_bytes, (one, other)))
    if unsigned or (flat and not binary and any(map(_is_text, (one, other)))):
        return pa.large_string()
    try:
        return pa.unify_schemas([pa.schema([("", t)]) for t in (one, other)], promote_options="permissive").types[0]
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def holds(kind: pa.DataType, other: pa.DataType) -> bool:
    """Whether a column of `kind` holds the values of a column of the other type."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if all(map(_is_list, (kind, other))):  # lists of any sort are cast into each other
        return holds(kind.value_type, other.value_type)
    wider = common_type(kind, other)
    return wider is not None and (wider == kind or (_is_text(wider) and _is_text(kind)))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def with_late_columns(
    schema: pa.Schema, wanted: Sequence[str], files: Sequence[InputFile], storage: Mapping[str, Any]
) -> pa.Schema:
    """The schema with the wanted columns that no sample has, but a later line. Reads LATE_BYTES at most for each of them.

    files: the readable ones, without those that their samples hold whole.
    """
    for name in wanted:
        left = LATE_BYTES
        for file in files if name not in schema.names else ():
            format = format_of(file.path)
            if format is not None and format.SCHEMALESS and left > 0:
                has_column, read = format.has_column(file.path, name, left, storage)
                if has_column:
                    schema = schema.append(pa.field(name, pa.large_string()))
                    break
                left -= read
    return schema


def hive_keys(name: str) -> dict[str, str | None]:
    """The `year=2020` folders in a file's path below the input, as values of columns: percent-decoded, HIVE_NULL as None."""
    pairs = re.findall(r"(?:^|(?<=/))([^/=]+)=([^/]*)(?=/)", name)
    return {unquote(key): None if value == HIVE_NULL else unquote(value) for key, value in pairs}


def with_hive(schema: pa.Schema, name: str) -> pa.Schema:
    for key in hive_keys(name):
        if key not in schema.names:
            schema = schema.append(pa.field(key, pa.string()))
    return schema


def schema_text(schema: pa.Schema) -> str:
    """A schema as a string for JSON."""
    return base64.b64encode(schema.serialize()).decode()


def schema_from(text: str) -> pa.Schema:
    """The schema of a `schema_text`."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))

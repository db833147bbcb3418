"""Texts of a table's rows: composed from columns and checked. pyarrow only."""

import string
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UsageError

# Separators, control and format characters, fillers and variation selectors alone: nothing that a reader sees.
INVISIBLE = (
    r"^[\p{Z}\p{Cc}\p{Cf}\x{034F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}\x{2800}\x{3164}\x{FE00}-\x{FE0F}\x{FFA0}"
    r"\x{E0100}-\x{E01EF}]*$"
)
NULL_TEXT, EMPTY_TEXT = "null text", "empty text"  # reasons of rows without a text


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Parse `'{title} {text}'` into [(literal, column), ...], the column None after the last literal.

    Raises UsageError for anything but bare column names.
    """
    parts = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--text-template {template!r}: {error}. Write it as '{{title}} {{text}}'") from error
    for literal, name, form, conversion in parsed:
        if name == "" or form or conversion:
            raise UsageError(f"--text-template {template!r}: only plain {{column}} names, as '{{title}} {{text}}'")
        parts.append((literal, name))
    if not any(name for _, name in parts):
        raise UsageError(f"--text-template {template!r} names no column. Write it as '{{title}} {{text}}'")
    return parts


def compose(table: pa.Table, template: Sequence[tuple[str, str | None]]) -> tuple[pa.Array, pa.Array]:
    """Compose the text of each row (large_string, stripped of white space, null without one), and the reason of a null (string).

    A null column counts as empty in a template of several; a row whose columns are all null has no text.
    """
    names = [name for _, name in template if name]
    columns, reasons = {}, pa.nulls(table.num_rows, pa.string())
    for name in dict.fromkeys(names):
        columns[name], broken = as_text(table[name])
        reasons = pc.coalesce(reasons, broken)
    absent = pc.is_null(columns[names[0]])
    for name in names[1:]:
        absent = pc.and_(absent, pc.is_null(columns[name]))
    parts: list[Any] = []
    for literal, column in template:
        parts.append(pa.scalar(literal, pa.large_string()))
        if column:
            parts.append(columns[column])
    separator = pa.scalar("", pa.large_string())
    joined = pc.binary_join_element_wise(*parts, separator, null_handling="replace", null_replacement="")
    joined = pc.utf8_trim_whitespace(joined)
    reasons = pc.coalesce(reasons, pc.if_else(absent, NULL_TEXT, None).cast(pa.string()))
    blank = pc.match_substring_regex(joined, INVISIBLE)
    reasons = pc.coalesce(reasons, pc.if_else(blank, EMPTY_TEXT, None).cast(pa.string()))
    return pc.if_else(pc.is_null(reasons), joined, pa.scalar(None, pa.large_string())), reasons


def as_text(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """A column as large_string, and the reason of each row that cannot be text (string). Parquet's strings are not always UTF-8."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    try:
        array.validate(full=True)
        text = array.cast(pa.large_string())
        text.validate(full=True)
        return text, pa.nulls(len(array), pa.string())
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return _decode(array)


def _decode(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Decode value by value, where some value is not UTF-8."""
    values = array.cast(pa.large_binary(), safe=False).to_pylist()
    texts, reasons = zip(*((None, None) if value is None else decode(value) for value in values), strict=True)
    return pa.array(texts, pa.large_string()), pa.array(reasons, pa.string())


def decode(value: bytes, encoding: str = "utf-8") -> tuple[str | None, str | None]:
    """The text of some bytes, and the reason why they are none."""
    try:
        return value.decode(encoding), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"

"""Plain text: one document a line, in a column named `text`. An empty line is a document without text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ...storage.listing import InputFile
from . import MAX_LINE, Measure
from ._lines import measure_lines, read_lines, sample

SUFFIXES = (".txt", ".text")
ROWS_PER_TABLE = 10_000  # Python strings, until they are an Arrow table
SCHEMA = pa.schema([("text", pa.large_string())])


def measure(file: InputFile, columns: Sequence[str] | None, options: Mapping[str, Any]) -> Measure:
    return measure_lines(file, options, SCHEMA, sample(file, options), complete=True)


def read(path: str, start: int, stop: int, columns: Sequence[str], options: Mapping[str, Any]) -> Iterator[pa.Table]:
    rows: list[tuple[str | None, int, str | None]] = []
    for position, line in read_lines(path, start, stop, options):
        rows.append(_row(position, line))
        if len(rows) == ROWS_PER_TABLE:
            yield _table(rows, columns)
            rows = []
    yield _table(rows, columns)


def _row(position: int, line: bytes | None) -> tuple[str | None, int, str | None]:
    """Text, position and error of a line."""
    if line is None:
        return None, position, f"line over {MAX_LINE >> 20} MiB"
    try:
        return line.decode("utf-8-sig" if position == 0 else "utf-8"), position, None
    except UnicodeDecodeError as error:
        return None, position, f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"


def _table(rows: list[tuple[str | None, int, str | None]], columns: Sequence[str]) -> pa.Table:
    texts, positions, errors = zip(*rows, strict=True) if rows else ((), (), ())
    data = {"text": pa.array(texts, pa.large_string())} if "text" in columns else {}
    return pa.table(data | {"_position": pa.array(positions, pa.int64()), "_error": pa.array(errors, pa.string())})

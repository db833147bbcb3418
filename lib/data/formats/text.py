"""Plain text: one document a line, in a column named `text`. An empty line is a document without text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ...storage.listing import InputFile
from . import Measure, tables
from ._lines import line_text, measure_lines, read_lines, sample

SUFFIXES = (".txt", ".text")
SCHEMALESS = False
SCHEMA = pa.schema([("text", pa.large_string())])


def measure(file: InputFile, columns: Sequence[str], options: Mapping[str, Any]) -> Measure:
    return measure_lines(file, options, SCHEMA, sample(file, options), complete=True)


def read(path: str, start: int, stop: int, columns: Sequence[str], options: Mapping[str, Any]) -> Iterator[pa.Table]:
    columns = [name for name in columns if name in SCHEMA.names]  # others are of the folders above the file
    lines = read_lines(path, start, stop, options)
    return tables((_row(position, line, len(columns)) for position, line in lines), columns)


def _row(position: int, line: bytes | None, columns: int) -> tuple[Any, ...]:
    text, error = line_text(line, "utf-8-sig" if position == 0 else "utf-8")
    return *([text] * columns), position, error

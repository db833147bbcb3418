"""File formats of a corpus, one file each, found by the ending of a file's name.

A format module has

    SUFFIXES                                    endings of names it reads, as (".csv", ".tsv")
    SCHEMALESS                                  whether each row may have columns of its own; then also
    has_column(path, name, limit, options)      whether a row in the first `limit` bytes has this column
    measure(file, columns, options) -> Measure  the length of the file, in the units by which it can be cut
    read(path, start, stop, columns, options)   tables of the rows whose unit lies in [start, stop)

`read` yields tables of those of the columns that the file has, `_position` (int64: row number or byte offset, the name of the row in
its file) and `_error` (string: the reason of an unreadable row, else null). A row is never left out.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import pyarrow as pa

from ...errors import InputError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ROWS_PER_TABLE = 10_000  # Python values, until they are an Arrow table
MAX_LINE = 256 << 20  # bytes; a longer line is a row with a reason, so that one file cannot take all memory of a worker


@dataclass(frozen=True)
class Measure:
    """The length of one file in units (rows, lines or bytes). breaks: the units at which a cut is cheap."""

    units: int
    unit_rows: float  # rows a unit: 1.0 where units are rows, an estimate where they are bytes
    exact: bool  # whether a unit is a row, so that the plan knows the number of rows
    row_bytes: float  # average, uncompressed, of the columns to read
    schema: pa.Schema
    complete: bool = True  # whether `schema` has every column, and not only those of a sample
    breaks: tuple[int, ...] = ()

    @property
    def rows(self) -> float:
        return self.units * self.unit_rows


def format_of(path: str) -> ModuleType | None:
    """The format module for a path, by its ending (compression ending aside), or None."""
    stem = path.lower()
    for ending in COMPRESSIONS:
        stem = stem.removesuffix(ending)
    for format in _formats():
        if stem.endswith(format.SUFFIXES):
            return format
    return None


def known_suffixes() -> str:
    """The endings of all formats, for error messages."""
    return " ".join(sorted(suffix for format in _formats() for suffix in format.SUFFIXES))


def compression_of(path: str) -> str | None:
    """Codec name for pyarrow, or None for a plain file."""
    return next((codec for ending, codec in COMPRESSIONS.items() if path.lower().endswith(ending)), None)


def tables(rows: Iterable[tuple[Any, ...]], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of rows that are Python values: the text of each column, the position, and the error."""
    rows = iter(rows)
    while block := list(islice(rows, ROWS_PER_TABLE)):
        *texts, positions, errors = zip(*block, strict=True)
        data = {name: pa.array(values, pa.large_string()) for name, values in zip(columns, texts, strict=True)}
        yield pa.table(data | {"_position": pa.array(positions, pa.int64()), "_error": pa.array(errors, pa.string())})


def error_table(count: int, reason: str, columns: Sequence[str], first_position: int = 0) -> pa.Table:
    """A table of `count` unreadable rows: every column null, and the reason."""
    data = {name: pa.nulls(count, pa.large_string()) for name in columns}
    data["_position"] = pa.array(range(first_position, first_position + count), pa.int64())
    data["_error"] = pa.array([reason] * count, pa.string())
    return pa.table(data)


def check_columns(schema: pa.Schema, columns: Sequence[str], path: str) -> None:
    """Raise InputError for the first column that is missing, or is there more than once."""
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise InputError(f"no column {missing[0]!r} in {path}. Columns there: {', '.join(schema.names)}")
    if repeated := [name for name in columns if schema.names.count(name) > 1]:
        raise InputError(
            f"{schema.names.count(repeated[0])} columns named {repeated[0]!r} in {path}. Rename all but one"
        )


def _formats() -> list[ModuleType]:
    """The format modules: every file of this folder whose name does not begin with `_`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]

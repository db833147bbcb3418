"""CSV and TSV with a header line, every value a string, quoted as pandas and Excel write both. Quoted values may contain line
ends: files are cut by record number, and the plan reads each file once to count its records.

TSV files with quotes that are letters like any others exist too (MS MARCO). A record of a TSV file whose quotes are not those of
a writer that quotes, is its lines as they stand.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from ...errors import InputError
from ...storage.listing import InputFile
from . import Measure, tables
from ._lines import open_bytes

SUFFIXES = (".csv", ".tsv")
SCHEMALESS = False
OPEN_QUOTE = "a quote is never closed: the rest of the file is in this record"
QUOTED_LINES = 10_000  # of one record of a TSV file at most; a quote that is closed later was no quote
csv.field_size_limit(1 << 30)  # characters; the default of 131,072 refuses long documents


def measure(file: InputFile, columns: Sequence[str], options: Mapping[str, Any]) -> Measure:
    records = _records(file.path, options)
    header, _ = next(records, (None, False))
    if not header:
        raise InputError(f"{file.path} has no header line")
    units = length = 0
    for record, _ in records:
        units, length = units + 1, length + sum(map(len, record))
    schema = pa.schema([(name, pa.large_string()) for name in header])
    return Measure(units, 1.0, True, max(1.0, length / max(units, 1)), schema)


def read(path: str, start: int, stop: int, columns: Sequence[str], options: Mapping[str, Any]) -> Iterator[pa.Table]:
    records = _records(path, options)
    header, _ = next(records, ([], False))
    columns = [name for name in columns if name in header]
    places = [header.index(name) for name in columns]
    rows = (_row(*record, len(header), places) for record in islice(records, start, stop))
    yield from tables(((*row[0], position, row[1]) for position, row in enumerate(rows, start)), columns)


def _records(path: str, options: Mapping[str, Any]) -> Iterator[tuple[list[str], bool]]:
    """Read the records without blank lines, each with whether it ends with the file inside a quote that is never closed.

    Bytes that are not UTF-8 become lone surrogates, which `_error` detects.
    """
    ended = False

    def lines(stream: io.TextIOWrapper) -> Iterator[str]:
        nonlocal ended
        yield from stream
        ended = True  # csv reads beyond the last line only inside a quote, or after the last record

    with io.TextIOWrapper(open_bytes(path, options), "utf-8-sig", errors="surrogateescape", newline="") as stream:
        if ".tsv" in path.lower().rsplit("/", 1)[-1]:
            yield from ((record, False) for record in _tab_records(stream) if record)
            return
        for record in csv.reader(lines(stream)):
            if record:
                yield record, ended


def _tab_records(stream: Iterable[str]) -> Iterator[list[str]]:
    """The records of a TSV file: quoted ones, and lines as they stand where the quotes of a record are not well formed."""
    lines = iter(stream)
    kept: list[str] = []

    def record_lines() -> Iterator[str]:
        for line in lines:
            kept.append(line)
            yield line
            if len(kept) > QUOTED_LINES:
                return

    while True:
        kept.clear()
        try:
            for record in csv.reader(record_lines(), delimiter="\t", strict=True):
                yield record
                kept.clear()
            return
        except csv.Error:
            yield from (line.rstrip("\r\n").split("\t") for line in kept)


def _row(record: list[str], unclosed: bool, fields: int, places: list[int]) -> tuple[list[str | None], str | None]:
    """The values at the places, and the reason why the record is bad, or None."""
    values = [_clean(record[place]) if place < len(record) else None for place in places]
    return values, OPEN_QUOTE if unclosed else _error(record, fields)


def _error(record: list[str], fields: int) -> str | None:
    """The reason why a record is bad, or None."""
    if len(record) != fields:
        return f"{len(record)} fields where the header has {fields}"
    if any(not value.isascii() and _clean(value) is None for value in record):
        return "not UTF-8"
    return None


def _clean(value: str) -> str | None:
    """The value, or None where it is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value

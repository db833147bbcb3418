"""JSON Lines: one object a line. Plain files are cut by byte range, compressed ones by line number.

Values reach the output exactly: a string unchanged ("00123" stays "00123"), anything else as its JSON text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ...storage.listing import InputFile
from . import Measure, tables
from ._lines import line_text, measure_lines, read_lines, sample

SUFFIXES = (".jsonl", ".ndjson", ".json")


def measure(file: InputFile, columns: Sequence[str], options: Mapping[str, Any]) -> Measure:
    lines = sample(file, options)
    names: dict[str, None] = {}
    for line in lines:
        value, _ = _parse(line)
        names.update(dict.fromkeys(value))
    return measure_lines(file, options, pa.schema([(name, pa.large_string()) for name in names]), lines, complete=False)


def read(path: str, start: int, stop: int, columns: Sequence[str], options: Mapping[str, Any]) -> Iterator[pa.Table]:
    lines = read_lines(path, start, stop, options)
    filled = ((position, line) for position, line in lines if line is None or line.strip())  # a blank line is no row
    return tables((_row(position, line, columns) for position, line in filled), columns)


def _row(position: int, line: bytes | None, columns: Sequence[str]) -> tuple[Any, ...]:
    value, error = _parse(line)
    return *(_text(value.get(name)) for name in columns), position, error


def _parse(line: bytes | None) -> tuple[dict[str, Any], str | None]:
    """The object of a line, or an empty one and the reason."""
    text, reason = line_text(line, "utf-8-sig")
    if text is None:
        return {}, reason
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or an integer of thousands of digits
        return {}, f"not JSON: {error}"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but {type(value).__name__}"
    return value, None


def _text(value: Any) -> str | None:
    """The value as text: a string unchanged, anything else as JSON; half a surrogate pair, which JSON can escape, as `?`."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()

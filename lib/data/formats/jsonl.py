"""JSON Lines: one object a line. Plain files are cut by byte range, compressed ones by line number.

Values reach the output exactly: a string unchanged ("00123" stays "00123"), a number as it stands in the file (1.10, 1e400), a
list or an object as JSON.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ...storage.listing import InputFile
from . import MAX_LINE, Measure, tables
from ._lines import BLOCK, line_text, measure_lines, open_bytes, read_lines, sample

SUFFIXES = (".jsonl", ".ndjson", ".json")
SCHEMALESS = True


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


def has_column(path: str, name: str, limit: int, options: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether any line in about the first `limit` bytes, uncompressed, has this column; and the bytes that were read."""
    keys = {json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass"), json.dumps(name).encode()}
    read = 0
    with open_bytes(path, options) as stream:
        while read < limit and (block := stream.read(BLOCK)):
            block += stream.readline(MAX_LINE)
            read += len(block)
            if any(key in block for key in keys) and any(name in _parse(line)[0] for line in block.splitlines()):
                return True, read
    return False, read


def _row(position: int, line: bytes | None, columns: Sequence[str]) -> tuple[Any, ...]:
    try:
        return _exact_row(position, line, columns)
    except RecursionError:
        return *(None for _ in columns), position, "JSON of too many levels"


def _exact_row(position: int, line: bytes | None, columns: Sequence[str]) -> tuple[Any, ...]:
    value, error = _parse(line)
    if not all(_is_exact(value.get(name)) for name in columns):
        value, error = _parse(line, parse_int=_Number, parse_float=_Number, parse_constant=_Number)
    return *(_text(value.get(name)) for name in columns), position, error


def _parse(line: bytes | None, **numbers: Any) -> tuple[dict[str, Any], str | None]:
    """The object of a line, or an empty one and the reason. numbers: json's functions for numbers."""
    text, reason = line_text(line, "utf-8-sig")
    if text is None:
        return {}, reason
    try:
        value = json.loads(text, **numbers)
    except (ValueError, RecursionError) as error:  # not JSON, or an integer of thousands of digits
        return {}, f"not JSON: {error}"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but {type(value).__name__}"
    return value, None


class _Number(str):
    """A JSON number as it stands in the file: Python's numbers would round it, or write it otherwise."""


def _is_exact(value: Any) -> bool:
    """Whether a value that json parsed by itself has one JSON text, which `_text` gives; 0 may have been -0."""
    return value is None or isinstance(value, str | bool) or (isinstance(value, int) and value != 0)


def _text(value: Any) -> str | None:
    """The value as text: a string or number unchanged, anything else as JSON; half a surrogate pair, which JSON escapes, as `?`."""
    if value is None:
        return None
    text = value if isinstance(value, str) else _json(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _json(value: Any) -> str:
    """The JSON text of a value that was parsed."""
    if isinstance(value, list):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(key)}: {_json(each)}" for key, each in value.items()) + "}"
    return value if isinstance(value, _Number) else json.dumps(value, ensure_ascii=False)

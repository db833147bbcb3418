"""JSON Lines: one object a line. Plain files are cut by byte range, compressed ones by line number.

Values reach the output exactly: a string unchanged ("00123" stays "00123"), anything else as its JSON text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ...storage.listing import InputFile
from . import MAX_LINE, Measure
from ._lines import measure_lines, read_lines, sample

SUFFIXES = (".jsonl", ".ndjson", ".json")
ROWS_PER_TABLE = 10_000  # Python values, until they are an Arrow table


def measure(file: InputFile, columns: Sequence[str] | None, options: Mapping[str, Any]) -> Measure:
    lines = sample(file, options)
    names: dict[str, None] = {}
    for line in lines:
        value, _ = _parse(line)
        names.update(dict.fromkeys(value))
    return measure_lines(file, options, pa.schema([(name, pa.large_string()) for name in names]), lines, complete=False)


def read(path: str, start: int, stop: int, columns: Sequence[str], options: Mapping[str, Any]) -> Iterator[pa.Table]:
    rows: dict[str, list[Any]] = _empty(columns)
    for position, line in read_lines(path, start, stop, options):
        if line is not None and not line.strip():
            continue  # a blank line is no row in JSON Lines
        value, error = _parse(line)
        for name in columns:
            rows[name].append(_text(value.get(name)))
        rows["_position"].append(position)
        rows["_error"].append(error)
        if len(rows["_position"]) == ROWS_PER_TABLE:
            yield _table(rows)
            rows = _empty(columns)
    yield _table(rows)


def _empty(columns: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [] for name in (*columns, "_position", "_error")}


def _table(rows: dict[str, list[Any]]) -> pa.Table:
    kinds = {"_position": pa.int64(), "_error": pa.string()}
    return pa.table({name: pa.array(values, kinds.get(name, pa.large_string())) for name, values in rows.items()})


def _parse(line: bytes | None) -> tuple[dict[str, Any], str | None]:
    """The object of a line, or an empty one and the reason."""
    if line is None:
        return {}, f"line over {MAX_LINE >> 20} MiB"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
    except (ValueError, RecursionError) as error:  # not JSON, or an integer of thousands of digits
        return {}, f"not JSON: {error}"
    if not isinstance(value, dict):
        return {}, f"not a JSON object but {type(value).__name__}"
    return value, None


def _text(value: Any) -> str | None:
    """The value as text: a string unchanged, anything else as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode() if not text.isascii() and _lone_surrogate(text) else text


def _lone_surrogate(text: str) -> bool:
    """Whether the text has half a surrogate pair, which JSON can escape and UTF-8 cannot represent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

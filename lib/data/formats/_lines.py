"""Lines of a file between two places: byte offsets in a plain file, line numbers in a compressed one."""

import errno
import io
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ...storage.filesystem import open_file
from ...storage.listing import InputFile
from ..texts import decode
from . import MAX_LINE, Measure, compression_of

SAMPLE_BYTES = 1 << 20  # of a file, for the average length of its lines and for its columns
BLOCK = 1 << 20  # bytes read at once


def open_bytes(path: str, options: Mapping[str, Any]) -> io.BufferedReader:
    """Open a buffered reader of the uncompressed bytes."""
    raw = open_file(path, options)
    codec = compression_of(path)
    if codec is None:
        return io.BufferedReader(raw, BLOCK)  # type: ignore[arg-type, type-var]
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec), BLOCK)  # type: ignore[arg-type, type-var]


def read_lines(path: str, start: int, stop: int, options: Mapping[str, Any]) -> Iterator[tuple[int, bytes | None]]:
    """Read (position, line without its end) of every line that begins in [start, stop); None for a line over MAX_LINE."""
    with open_bytes(path, options) as file:
        if compression_of(path):
            position = 0
            while position < stop:
                line, length = _next_line(file)
                if length == 0:
                    return
                if position >= start:
                    yield position, line
                position += 1
            return
        position = _seek_line(file, start)
        while position < stop:
            line, length = _next_line(file)
            if length == 0:
                raise OSError(errno.EIO, f"the file ends at byte {position}, before {stop}", path)
            yield position, line
            position += length


def line_text(line: bytes | None, encoding: str) -> tuple[str | None, str | None]:
    """The text of a line, and the reason why it has none."""
    return (None, f"line over {MAX_LINE >> 20} MiB") if line is None else decode(line, encoding)


def count_lines(file: InputFile, options: Mapping[str, Any]) -> int:
    """Count the lines of a compressed file, in one pass over it."""
    with open_bytes(file.path, options) as stream:
        lines, last = 0, b"\n"
        while block := stream.read(BLOCK):
            lines, last = lines + block.count(b"\n"), block
        return lines + (not last.endswith(b"\n"))


def measure_lines(
    file: InputFile, options: Mapping[str, Any], schema: pa.Schema, lines: list[bytes], complete: bool
) -> Measure:
    """The length of a plain file in bytes, of a compressed one in lines; the rows of neither are known before it is read."""
    row_bytes = max(1.0, (sum(map(len, lines)) + len(lines)) / max(len(lines), 1))
    if compression_of(file.path):
        return Measure(count_lines(file, options), 1.0, False, row_bytes, schema, complete)
    return Measure(file.size, 1 / row_bytes, False, row_bytes, schema, complete)


def sample(file: InputFile, options: Mapping[str, Any]) -> list[bytes]:
    """Read the first lines of a file, about SAMPLE_BYTES, at least one complete line."""
    with open_bytes(file.path, options) as stream:
        first = stream.read(SAMPLE_BYTES)
        return (first + stream.readline(MAX_LINE)).splitlines()


def _seek_line(file: io.BufferedReader, start: int) -> int:
    """Seek the first line that begins at or after `start`; returns its position."""
    if start == 0:
        return 0
    file.seek(start - 1)
    position = start - 1
    while True:
        part = file.readline(MAX_LINE)
        position += len(part)
        if not part or part.endswith(b"\n"):
            return position


def _next_line(file: io.BufferedReader) -> tuple[bytes | None, int]:
    """The next line, and its length in bytes with its end; (b"", 0) at the end of the file."""
    line = file.readline(MAX_LINE)
    length = len(line)
    if length < MAX_LINE or line.endswith(b"\n"):
        return line.rstrip(b"\r\n"), length
    while part := file.readline(BLOCK):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return None, length

"""The files of a corpus, listed and measured: the rows of each, the places where it may be cut, its columns."""

import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa

from ..cli.options import option
from ..errors import InputError
from ..storage.listing import InputFile, find
from ..storage.retry import is_damage
from .columns import merged_schema, with_hive, with_late_columns
from .formats import Measure, check_columns, compression_of, format_of, known_suffixes
from .formats._lines import SAMPLE_BYTES
from .texts import parse_template

FOOTER_THREADS = 32  # one request in flight each: 10,000 footers at 50 ms are read in 16 s
AUTOMATIC_ID = "id"  # the column of ids without --id-column
REASON_LETTERS = 200  # of a reader's error in a reason, which stands in every row of the file


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The rows to read, and their columns."""

    input: str = option("File, folder or glob of Parquet, JSONL, CSV/TSV or text; any fsspec URL.")
    id_column: str | None = option("Column that names a row. Default: 'id' if there is one, else FILE#POSITION.", None)
    keep_columns: tuple[str, ...] = option("Columns copied to the output, by commas.", ())
    limit: int | None = option("Only the first N rows.", None, min=1)
    shard_rows: int | None = option(
        "Rows a shard. Default: about 128 MiB of output, less for a small corpus.", None, min=1
    )

    same_types: ClassVar[bool] = True  # whether a column must have one type that holds the values of all files

    def text_columns(self) -> list[str]:
        """The columns that must be text."""
        return []

    def columns(self) -> list[str]:
        """Every column that the options name, each once."""
        return list(dict.fromkeys([*self.text_columns(), *filter(None, [self.id_column]), *self.keep_columns]))


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(RowOptions):
    """The rows to read, and the columns that their text is made of."""

    text_column: str = option("Column to embed.", "text")
    text_template: str | None = option(
        "Text made of several columns, as '{title} {text}'. Overrides --text-column.", None
    )

    def text_columns(self) -> list[str]:
        """The columns that the text is made of. Raises UsageError for a template without any."""
        if self.text_template is None:
            return [self.text_column]
        return list(dict.fromkeys(name for _, name in parse_template(self.text_template) if name))


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, each measured. `schema` holds every column a row can have, hive keys included."""

    files: tuple[InputFile, ...]
    measures: tuple[Measure | str, ...]  # a str says why the file cannot be read
    schema: pa.Schema
    id_column: str | None  # of --id-column, or `id` where every file has it

    @property
    def rows(self) -> float:
        """The number of rows; an estimate where line files are cut by bytes."""
        return sum(1 if isinstance(m, str) else m.rows for m in self.measures)

    @property
    def row_bytes(self) -> float:
        """Average bytes of a row, in the columns to read."""
        known = [m for m in self.measures if isinstance(m, Measure)]
        return sum(m.rows * m.row_bytes for m in known) / max(sum(m.rows for m in known), 1)


def list_files(options: RowOptions, storage: Mapping[str, Any]) -> list[InputFile]:
    """List the files to read, sorted. Raises InputError when there is none, or none of a known format."""
    listed = find(options.input, storage)
    if not listed:
        raise InputError(
            f"nothing at {options.input}. Give a file, a folder or a glob such as 's3://bucket/docs/*.parquet'"
        )
    files = [file for file in listed if format_of(file.path)]
    if not files:
        some = ", ".join(file.path.rsplit("/", 1)[-1] for file in listed[:3])
        raise InputError(
            f"no file of a known format at {options.input} (found {some}). Known: {known_suffixes()}, also .gz and .zst"
        )
    return files


def measure(files: Sequence[InputFile], options: RowOptions, storage: Mapping[str, Any], strict: bool) -> Corpus:
    """Read footers and samples of every file, in parallel, check the columns, and cut the corpus off at the limit.

    An unreadable file becomes one row with its reason, or, when `strict`, an InputError.
    """
    wanted = options.columns()
    measures = _measure_all(files, wanted, storage)
    unreadable = [(f, m) for f, m in zip(files, measures, strict=True) if isinstance(m, str)]
    if unreadable and strict:
        raise InputError(f"{unreadable[0][0].path}: {unreadable[0][1]} ({len(unreadable)} such files; --strict is on)")
    with_rows = [m for m in measures if isinstance(m, Measure) and m.units and m.schema.names]
    have_ids = bool(with_rows) and all(AUTOMATIC_ID in m.schema.names for m in with_rows)
    id_column = options.id_column or (AUTOMATIC_ID if have_ids else None)
    wanted = list(dict.fromkeys([*wanted, *filter(None, [id_column])]))
    schema = merged_schema(files, measures, wanted if options.same_types else ())
    pairs = zip(files, measures, strict=True)
    partly_seen = [f for f, m in pairs if isinstance(m, Measure) and (f.size > SAMPLE_BYTES or compression_of(f.path))]
    schema = with_late_columns(schema, wanted, partly_seen, storage)
    for file, m in zip(files, measures, strict=True):
        if isinstance(m, Measure) and (m.units or m.schema.names):
            check_columns(with_hive(m.schema, file.name) if m.complete else schema, wanted, file.path)
    for name in options.text_columns():
        if name in schema.names and pa.types.is_nested(schema.field(name).type):
            raise InputError(f"column {name!r} is {schema.field(name).type}, not text. Choose another --text-column")
    corpus = Corpus(tuple(files), tuple(measures), schema, id_column)
    return _first_rows(corpus, options.limit, storage) if options.limit else corpus


def columns_at(url: str, storage: Mapping[str, Any]) -> list[str]:
    """Names of the columns that the files there have. Raises InputError when none can be read."""
    files = list_files(RowOptions(input=url), storage)
    measures = _measure_all(files, (), storage)
    names = merged_schema(files, measures).names
    if not names:
        reasons = [measure for measure in measures if isinstance(measure, str)] or ["it is empty"]
        raise InputError(f"nothing can be read of {url}: {reasons[0]}")
    return names


def _first_rows(corpus: Corpus, limit: int, storage: Mapping[str, Any]) -> Corpus:
    """Cut the corpus off after exactly `limit` rows. Line files are read up to there: their rows are known only by reading."""
    files, measures, left = [], [], limit
    for file, measure in zip(corpus.files, corpus.measures, strict=True):
        if left <= 0:
            break
        if isinstance(measure, Measure):
            stop, rows = _place_of_row(file, measure, left, storage)
            measure = replace(measure, units=stop, breaks=tuple(b for b in measure.breaks if b <= stop))
        else:
            rows = 1
        files.append(file)
        measures.append(measure)
        left -= rows
    return replace(corpus, files=tuple(files), measures=tuple(measures))


def _place_of_row(file: InputFile, measure: Measure, row: int, storage: Mapping[str, Any]) -> tuple[int, int]:
    """The unit at which row number `row` begins, and the rows before it; the file's end when it has fewer rows."""
    if measure.exact:
        stop = min(row, measure.units)
        return stop, stop
    format, seen = format_of(file.path), 0
    assert format is not None, file.path
    for table in format.read(file.path, 0, measure.units, [], storage):
        if seen + table.num_rows > row:
            return table["_position"][row - seen].as_py(), row
        seen += table.num_rows
    return measure.units, seen


def _measure_all(files: Sequence[InputFile], columns: Sequence[str], storage: Mapping[str, Any]) -> list[Measure | str]:
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return list(threads.map(partial(_measure, columns=columns, storage=storage), files))


def _measure(file: InputFile, columns: Sequence[str], storage: Mapping[str, Any]) -> Measure | str:
    """The measure of a file, or the reason why it is unreadable. Raises InputError for a failing disk or network."""
    format = format_of(file.path)
    assert format is not None, file.path
    if file.size == 0:
        return Measure(0, 1.0, True, 1.0, pa.schema([]))
    try:
        return format.measure(file, columns, storage)
    except (pa.ArrowException, OSError) as error:
        if is_damage(error):
            return str(error)[:REASON_LETTERS]
        raise InputError(f"cannot read {file.path}: {error}. Mend it and start again") from error
    except (UnicodeError, csv.Error, InputError) as error:
        return str(error)[:REASON_LETTERS]

"""Vectors as they lie in Parquet, ours or anyone's: checked once by the driver, then read shard by shard as float32."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.corpus import Corpus
from ...data.reader import as_one_array, batches, read_rows
from ...data.shards import Shard, cut_shards, sample_shards
from ...engine.job import RunOptions
from ...engine.parts import FOOTER_THREADS
from ...errors import InputError
from ...storage.filesystem import open_file
from ...storage.listing import InputFile

SHARD_BYTES = 64 << 20  # of float32 vectors a shard
UNIT = 1e-3  # how far from 1 the length of a normalised vector in 16 bits may lie
ENCODING = (
    "revision",
    "pooling",
    "bidirectional",
    "append_eos",
    "dim",
    "normalized",
)  # what vectors must share to be compared
IDENTITY = ("model", *ENCODING, "prompt", "output_dtype", "int8_ranges")
ROWS_AT_ONCE = 512  # whose squares a core's cache holds
FIRST_IDS = 100
REASON = "error"  # the column of embed_corpus.py's output that says why a row has no vector


@dataclass(frozen=True, kw_only=True)
class VectorOptions(RunOptions):
    """A stage's run: no column of its input is text."""

    def text_columns(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Vectors:
    """What the files say of their vectors. made: by which model, with which prompt, where embed_corpus.py wrote them.
    type: of a number. dim: 0 of a file without any vector. reasons: whether all have the column REASON, of text."""

    dim: int
    type: str
    made: Mapping[str, Any]
    reasons: bool

    @property
    def ranges(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Of int8 vectors, least and greatest by dimension."""
        return self.made.get("int8_ranges") if self.type == "int8" else None


def describe(files: Sequence[InputFile], column: str, storage: Mapping[str, Any]) -> Vectors:
    """Read every footer. Raises InputError for files that differ in dimensions, type or model, or that have no vectors."""
    for file in files:
        if not file.path.endswith((".parquet", ".pq")):
            raise InputError(f"{file.path} is not Parquet, and vectors are read from Parquet alone")
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        found = list(threads.map(lambda file: _describe(file, column, storage), files))
    with_some = [place for place, each in enumerate(found) if each.dim]
    if not with_some:
        raise InputError(
            f"no vector in column {column!r} of {files[0].path}, nor in any other file. Name theirs with --vector-column"
        )
    first, path = found[with_some[0]], files[with_some[0]].path
    for file, other in ((files[place], found[place]) for place in with_some):
        for what in ("dim", "type"):
            if getattr(other, what) != getattr(first, what):
                raise InputError(
                    f"vectors of {getattr(first, what)} and of {getattr(other, what)} ({what}): {path} and {file.path}. An index "
                    "holds one kind: build one for each"
                )
        if said := unlike(first.made, other.made):
            raise InputError(
                f"{path} and {file.path} were not made alike ({said}). Their vectors cannot be compared: embed both with "
                "the same model"
            )
    return replace(first, reasons=all(each.reasons for each in found))


def check_ids(corpus: Corpus, storage: Mapping[str, Any]) -> None:
    """Read the first ids. Raises InputError where they are no text and cannot become it, as bytes of UUIDs and lists."""
    name = corpus.id_column
    if name is None:
        return
    first = sample_shards(cut_shards(corpus, FIRST_IDS), 1, FIRST_IDS)
    try:
        for shard in first:
            read_rows(shard, [name], corpus.schema, storage)[name].cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"column {name!r} is {corpus.schema.field(name).type}, which names no row: ids are text or numbers. Write it as text, or "
            "choose another --id-column"
        ) from error


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What keeps vectors that were made so from being compared, in words; "" where nothing does."""
    differing = [name for name in IDENTITY if one.get(name) != other.get(name)]
    return "; ".join(f"{name}: {one.get(name)!r} and {other.get(name)!r}" for name in differing)


def _describe(file: InputFile, column: str, storage: Mapping[str, Any]) -> Vectors:
    try:
        with open_file(file.path, storage) as source, pq.ParquetFile(source) as parquet:
            schema = parquet.schema_arrow
            if column not in schema.names:
                raise InputError(
                    f"{file.path} has no column {column!r} (there: {', '.join(schema.names)}). Name it with --vector-column"
                )
            type = schema.field(column).type
            dim = type.list_size if pa.types.is_fixed_size_list(type) else _common_length(parquet, column, file.path)
    except pa.ArrowException as error:
        raise InputError(f"{file.path} cannot be read: {str(error)[:200]}. Mend it, or take it away") from error
    number = type.value_type if hasattr(type, "value_type") else type
    made = json.loads((schema.metadata or {}).get(b"shoal", b"{}"))
    known = pa.types.is_floating(number) or pa.types.is_int8(number) or pa.types.is_null(type)
    if made.get("output_dtype") == "ubinary" or not known:
        raise InputError(
            f"column {column!r} of {file.path} is {type}: indexes are built of float32, float16, float64 or int8 vectors. Embed "
            "with --output-dtype float16; the index makes the codes small"
        )
    said = schema.field(REASON).type if REASON in schema.names else pa.null()
    return Vectors(dim, str(number), made, pa.types.is_string(said) or pa.types.is_large_string(said))


def _common_length(parquet: pq.ParquetFile, column: str, path: str) -> int:
    """Of lists of no fixed length, the commonest among the first that there are; 0 in a file without any."""
    type = parquet.schema_arrow.field(column).type
    if pa.types.is_null(type):
        return 0
    if not (pa.types.is_list(type) or pa.types.is_large_list(type)):
        raise InputError(f"column {column!r} of {path} is {type}, not vectors. Name theirs with --vector-column")
    for batch in parquet.iter_batches(1024, columns=[column]):
        lengths = pc.list_value_length(batch.column(0)).drop_null()
        lengths = lengths.filter(pc.greater(lengths, 0))
        if len(lengths):
            return pc.mode(lengths)[0]["mode"].as_py()
    return 0


@dataclass(frozen=True)
class Rows:
    """Rows of a shard. table: `id` and the carried columns; vectors: float32 [n, dim], zeros where reasons (string) has one;
    lengths: float32 [n], as they came."""

    table: pa.Table
    vectors: np.ndarray
    reasons: pa.Array
    lengths: np.ndarray

    @property
    def good(self) -> np.ndarray:
        return self.reasons.is_null().to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Source:
    """How a shard's vectors are read. normalize: lengths are made 1. reasons: there is a column REASON. ranges: of int8 vectors,
    least and greatest by dimension."""

    column: str
    id_column: str | None
    carried: tuple[str, ...]
    dim: int
    normalize: bool
    reasons: bool
    columns: pa.Schema
    storage: Mapping[str, Any] = field(repr=False)
    ranges: tuple[Sequence[float], Sequence[float]] | None = None

    def read(self, shard: Shard) -> Rows:
        """Every row, in order. Raises InputError when a file has changed since the plan."""
        return self._rows(read_rows(shard, self._names(), self.columns, self.storage))

    def batches(self, shard: Shard) -> Iterator[Rows]:
        """The same, some rows at a time: a processor's cache keeps these from one step to the next."""
        return map(self._rows, batches(shard, self._names(), self.columns, self.storage))

    def _names(self) -> list[str]:
        wanted = [self.column, self.id_column, *self.carried, REASON if self.reasons else None]
        return list(dict.fromkeys(name for name in wanted if name))

    def _rows(self, table: pa.Table) -> Rows:
        ids = table["_source"].cast(pa.large_string())
        if self.id_column:
            ids = pc.coalesce(table[self.id_column].cast(pa.large_string()), ids)
        vectors, lengths, reasons = self._numbers(as_one_array(table[self.column]))
        said = [as_one_array(table["_error"])]
        if self.reasons:
            said.append(as_one_array(table[REASON]).cast(pa.string()))
        reasons = pc.if_else(reasons.is_valid(), pc.coalesce(*said, reasons), reasons)
        if reasons.null_count < len(reasons):
            vectors = np.where(reasons.is_null().to_numpy(zero_copy_only=False)[:, None], vectors, np.float32(0))
        kept = pa.table({"id": ids} | {name: table[name] for name in self.carried})
        return Rows(kept, vectors, reasons, lengths)

    def _numbers(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """float32 [n, dim], their lengths as they came, and why a row is no vector (string, null where it is one)."""
        whole = pc.equal(pc.list_value_length(column), self.dim).fill_null(False).to_numpy(zero_copy_only=False)
        held = column if whole.all() else column.filter(pa.array(whole))
        flat = held.flatten().to_numpy(zero_copy_only=False)
        found = flat.reshape(-1, self.dim).astype(np.float32, copy=False)
        if self.ranges is not None:
            low, high = np.array(self.ranges, np.float32)
            found = low + (found + 128.5) * (high - low) / 255
        vectors = found
        if len(found) < len(whole):
            vectors = np.zeros((len(whole), self.dim), np.float32)
            vectors[whole] = found
        lengths = _lengths(vectors)
        reasons = np.full(len(whole), None, object)
        if self.normalize:
            reasons[lengths == 0] = "a vector of zeros has no direction"
            vectors = vectors / np.where(np.isfinite(lengths) & (lengths > 0), lengths, 1)[:, None]
        reasons[~np.isfinite(lengths)] = "the vector is not finite"
        reasons[~whole] = f"not a vector of {self.dim} dimensions"
        reasons[column.is_null().to_numpy(zero_copy_only=False)] = "no vector"
        return vectors, lengths, pa.array(reasons, pa.string())


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """float32 [n]. A few rows at a time, for numpy squares them all first: four times as quick, to the same bits."""
    starts = range(0, max(len(vectors), 1), ROWS_AT_ONCE)
    return np.concatenate([np.linalg.norm(vectors[start : start + ROWS_AT_ONCE], axis=1) for start in starts])


def off_unit(lengths: np.ndarray) -> float:
    """The share of vectors whose length ([n]) is not 1."""
    return float(np.mean(np.abs(lengths - 1) > UNIT)) if len(lengths) else 0.0

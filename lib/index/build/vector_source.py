"""Vectors in Parquet, from the embed job or from elsewhere: checked once by the driver, then read shard by shard as float32."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...cli.options import option
from ...data.corpus import Corpus, RowOptions
from ...data.reader import as_one_array, batches, read_rows
from ...data.shards import Shard, cut_shards, sample_shards
from ...engine.parts import FOOTER_THREADS
from ...errors import InputError
from ...storage.filesystem import open_file
from ...storage.listing import InputFile

SHARD_BYTES = 64 << 20  # of float32 vectors a shard
MAX_UNIT_ERROR = 1e-3  # of the length of a normalised vector in 16 bits
# Facts of an encoder that are equal wherever vectors can be compared.
ENCODING = "revision", "pooling", "bidirectional", "append_eos", "dim", "normalized"
IDENTITY = ("model", *ENCODING, "prompt", "output_dtype", "int8_ranges")
ROWS_AT_ONCE = 512  # whose squares fit a core's cache
FIRST_IDS = 100
REASON = "error"  # the column of the embed job's output with the reason that a row has no vector


@dataclass(frozen=True, kw_only=True)
class VectorOptions(RowOptions):
    """The input of an index: rows with vectors."""

    input: str = option("Vectors: embed_corpus.py's output, or any Parquet; any fsspec URL.", "")
    vector_column: str = option("Column with the vectors.", "embedding")
    keep_columns: tuple[str, ...] = option("Columns kept beside the ids, by commas.", ())
    shard_rows: int | None = option("Rows a shard of the encoding. Default: about 64 MiB of vectors.", None, min=1)

    def columns(self) -> list[str]:
        """Every column that the options name, each once."""
        return list(dict.fromkeys([*super().columns(), self.vector_column]))


@dataclass(frozen=True)
class VectorFormat:
    """The format of the vectors of some files.

    type: of a number. dim: 0 for a file without any vector. encoder: the model, its revision and the prompt, where the embed job
    wrote the files. has_reasons: every file has the column REASON, of text.
    """

    dim: int
    type: str
    encoder: Mapping[str, Any]
    has_reasons: bool

    @property
    def ranges(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """The least and the greatest number of each dimension, for int8 vectors."""
        return self.encoder.get("int8_ranges") if self.type == "int8" else None


def describe(files: Sequence[InputFile], column: str, storage: Mapping[str, Any]) -> VectorFormat:
    """Read every footer. Raises InputError for files that differ in dimensions, type or model, or that have no vectors."""
    for file in files:
        if not file.path.endswith((".parquet", ".pq")):
            raise InputError(f"{file.path} is not Parquet, and vectors are read from Parquet alone")
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        formats = list(threads.map(lambda file: _describe(file, column, storage), files))
    with_vectors = [(file.path, each) for file, each in zip(files, formats, strict=True) if each.dim]
    if not with_vectors:
        raise InputError(
            f"no vector in column {column!r} of {files[0].path}, nor in any other file. Name theirs with --vector-column"
        )
    for path, each in with_vectors:
        _refuse_other_format(*with_vectors[0], path, each)
    return replace(with_vectors[0][1], has_reasons=all(each.has_reasons for each in formats))


def _refuse_other_format(path: str, first: VectorFormat, other_path: str, other: VectorFormat) -> None:
    for name in ("dim", "type"):
        if getattr(other, name) != getattr(first, name):
            raise InputError(
                f"vectors of {getattr(first, name)} and of {getattr(other, name)} ({name}): {path} and {other_path}. An index "
                "holds one kind: build one for each"
            )
    if difference := encoder_difference(first.encoder, other.encoder):
        raise InputError(
            f"{path} and {other_path} were not made alike ({difference}). Their vectors cannot be compared: embed both with "
            "the same model"
        )


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


def encoder_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The differences that make vectors of two encoders incomparable, in words; "" if there are none."""
    pairs = {name: (one.get(name), other.get(name)) for name in IDENTITY}
    return "; ".join(f"{name}: {mine!r} and {theirs!r}" for name, (mine, theirs) in pairs.items() if mine != theirs)


def _describe(file: InputFile, column: str, storage: Mapping[str, Any]) -> VectorFormat:
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
    encoder = json.loads((schema.metadata or {}).get(b"shoal", b"{}"))
    known = pa.types.is_floating(number) or pa.types.is_int8(number) or pa.types.is_null(type)
    if encoder.get("output_dtype") == "ubinary" or not known:
        raise InputError(
            f"column {column!r} of {file.path} is {type}: indexes are built of float32, float16, float64 or int8 vectors. Embed "
            "with --output-dtype float16; the index makes the codes small"
        )
    reason = schema.field(REASON).type if REASON in schema.names else pa.null()
    has_reasons = pa.types.is_string(reason) or pa.types.is_large_string(reason)
    return VectorFormat(dim, str(number), encoder, has_reasons)


def _common_length(parquet: pq.ParquetFile, column: str, path: str) -> int:
    """The commonest length of the first lists of variable length; 0 for a file without any."""
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
class VectorRows:
    """Rows of a shard.

    table: `id` and the kept columns. vectors: float32 [n, dim], zeros in rows with a reason. reasons: why a row has no vector,
    string, else null. lengths: of the vectors before normalization, float32 [n].
    """

    table: pa.Table
    vectors: np.ndarray
    reasons: pa.Array
    lengths: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """bool [n]: the rows that have a vector."""
        return self.reasons.is_null().to_numpy(zero_copy_only=False)

    @property
    def valid_vectors(self) -> np.ndarray:
        """float32 [valid, dim]: the vectors of those rows; no copy where every row has one."""
        valid = self.valid
        return self.vectors if valid.all() else self.vectors[valid]


@dataclass(frozen=True)
class VectorSource:
    """Reads the vectors of a shard.

    normalize: scale vectors to length 1. columns: all columns of the input. storage: fsspec options.
    """

    column: str
    id_column: str | None
    keep_columns: tuple[str, ...]
    format: VectorFormat
    normalize: bool
    columns: pa.Schema
    storage: Mapping[str, Any] = field(repr=False)

    @property
    def dim(self) -> int:
        return self.format.dim

    def read(self, shard: Shard) -> VectorRows:
        """Every row, in order. Raises InputError when a file has changed since the plan."""
        return self._rows(read_rows(shard, self._names(), self.columns, self.storage))

    def batches(self, shard: Shard) -> Iterator[VectorRows]:
        """The same, some rows at a time: they stay in a processor's cache from one step to the next."""
        return map(self._rows, batches(shard, self._names(), self.columns, self.storage))

    def _names(self) -> list[str]:
        names = [self.column, self.id_column, *self.keep_columns, REASON if self.format.has_reasons else None]
        return list(dict.fromkeys(filter(None, names)))

    def _rows(self, table: pa.Table) -> VectorRows:
        ids = table["_source"].cast(pa.large_string())
        if self.id_column:
            ids = pc.coalesce(table[self.id_column].cast(pa.large_string()), ids)
        vectors, lengths, reasons = self._vectors(as_one_array(table[self.column]))
        better_reasons = [as_one_array(table["_error"])]
        if self.format.has_reasons:
            better_reasons.append(as_one_array(table[REASON]).cast(pa.string()))
        reasons = pc.if_else(reasons.is_valid(), pc.coalesce(*better_reasons, reasons), reasons)
        if reasons.null_count < len(reasons):
            vectors = np.where(reasons.is_null().to_numpy(zero_copy_only=False)[:, None], vectors, np.float32(0))
        kept = pa.table({"id": ids} | {name: table[name] for name in self.keep_columns})
        return VectorRows(kept, vectors, reasons, lengths)

    def _vectors(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """Vectors, float32 [n, dim]; their lengths before normalization; the reasons of rows without one, string."""
        complete = pc.equal(pc.list_value_length(column), self.dim).fill_null(False).to_numpy(zero_copy_only=False)
        vectors = self._numbers(column if complete.all() else column.filter(pa.array(complete)))
        if len(vectors) < len(complete):
            spread = np.zeros((len(complete), self.dim), np.float32)
            spread[complete] = vectors
            vectors = spread
        lengths = _lengths(vectors)
        reasons = np.full(len(complete), None, object)
        if self.normalize:
            reasons[lengths == 0] = "a vector of zeros has no direction"
            vectors = vectors / np.where(np.isfinite(lengths) & (lengths > 0), lengths, 1)[:, None]
        reasons[~np.isfinite(lengths)] = "the vector is not finite"
        reasons[~complete] = f"not a vector of {self.dim} dimensions"
        reasons[column.is_null().to_numpy(zero_copy_only=False)] = "no vector"
        return vectors, lengths, pa.array(reasons, pa.string())

    def _numbers(self, column: pa.Array) -> np.ndarray:
        """float32 [n, dim] of lists of that length."""
        numbers = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim).astype(np.float32, copy=False)
        if self.format.ranges is None:
            return numbers
        low, high = np.array(self.format.ranges, np.float32)
        return low + (numbers + 128.5) * (high - low) / 255


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """float32 [n]. Some rows at a time: numpy stores all squares first, and this is four times as fast, to the same bits."""
    starts = range(0, max(len(vectors), 1), ROWS_AT_ONCE)
    return np.concatenate([np.linalg.norm(vectors[start : start + ROWS_AT_ONCE], axis=1) for start in starts])


def off_unit_share(lengths: np.ndarray) -> float:
    """The share of vectors whose length ([n]) is not 1."""
    return float(np.mean(np.abs(lengths - 1) > MAX_UNIT_ERROR)) if len(lengths) else 0.0

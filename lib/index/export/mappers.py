"""Exports of a shard's vectors to other stores: a Parquet file that the store imports, or fragments of a Lance dataset.

The store's files are published before the part that names them. A Parquet file is named after its shard, so one that is written again
is the same file. A fragment has a random name: one that no part names is in no dataset.
"""

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.shards import Shard
from ...engine.mapper import FusedMapper, Result
from ...engine.publish import ROW_GROUP
from ...storage import atomic
from ...storage.filesystem import filesystem
from ...storage.folder import Folder
from ..build.layout import FILE, VECTOR
from ..build.vector_source import VectorSource

ID, METADATA = "id", "metadata"


def file_name(first: int, shard: Shard) -> str:
    """first: the index's number of the run's first shard."""
    return f"vectors-{first + shard.number:06d}-{shard.key}.parquet"


@dataclass(frozen=True)
class ExportRows:
    """Rows with a vector. table: `id` and the kept columns. read: rows that the shard has, with a vector or without."""

    table: pa.Table
    vectors: pa.Array
    read: int
    seconds: float

    @classmethod
    def of_shard(cls, source: VectorSource, shard: Shard) -> "ExportRows":
        began = time.perf_counter()
        rows = source.read(shard)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.valid_vectors.reshape(-1)), source.dim)
        table = rows.table.filter(pa.array(rows.valid))
        return cls(table, vectors, len(rows.valid), time.perf_counter() - began)

    def result(self, files: Sequence[str], facts: Mapping[str, object]) -> Result:
        """The part that names the files written from these rows."""
        counts = {"source_rows": self.read, "errors": self.read - len(self.table)}
        table = pa.table({FILE: pa.array(files, pa.string())})
        return Result(table, counts, facts, seconds={"read": self.seconds})


@dataclass(frozen=True)
class ExportFiles(FusedMapper):
    """A shard of vectors -> a Parquet file in `place`, and a part that names it in a row; none where no row has a vector.

    first: as in `file_name`. column: the store's name for a vector. with_metadata: add METADATA, from the kept columns.
    """

    source: VectorSource
    place: Folder
    first: int
    column: str
    with_metadata: bool

    def load(self) -> Callable[[Shard], Result]:
        return self._export

    def _export(self, shard: Shard) -> Result:
        rows = ExportRows.of_shard(self.source, shard)
        # Milvus takes neither large strings nor lists of a fixed size.
        data = {ID: rows.table[ID].cast(pa.string()), self.column: rows.vectors.cast(pa.list_(pa.float32()))}
        if self.with_metadata:
            kept = rows.table.select(list(self.source.keep_columns)).to_pylist()
            data[METADATA] = pa.array([metadata(row) for row in kept], pa.string())
        files = [file_name(self.first, shard)] if len(rows.table) else []
        for name in files:
            self.place.publish(name, _parquet(pa.table(data)))
        return rows.result(files, {})


@dataclass(frozen=True)
class ExportFragments(FusedMapper):
    """A shard of vectors -> fragments of the Lance dataset at `url`, and a part that names their files in rows.

    options: of the store, as Lance names them. Facts: `fragments`, all that a commit needs of them.
    """

    source: VectorSource
    url: str
    options: Mapping[str, str] = field(repr=False)

    def load(self) -> Callable[[Shard], Result]:
        return self._export

    def _export(self, shard: Shard) -> Result:
        from lance.fragment import write_fragments

        rows, schema, fragments = ExportRows.of_shard(self.source, shard), lance_schema(self.source), []
        if len(rows.table):
            columns = [rows.vectors if name == VECTOR else rows.table[name] for name in schema.names]
            data = [column.cast(target) for column, target in zip(columns, schema.types, strict=True)]
            # "overwrite" writes data files alone, and reads nothing of a dataset that may exist.
            table = pa.table(data, schema=schema)
            fragments = write_fragments(table, self.url, mode="overwrite", storage_options=dict(self.options))
        files = [file.path for fragment in fragments for file in fragment.files]
        return rows.result(files, {"fragments": [fragment.to_json() for fragment in fragments]})


def lance_schema(source: VectorSource) -> pa.Schema:
    """ID, the kept columns as the input types them, VECTOR as a list of fixed size, which Lance can index."""
    kept = {name: source.columns.field(name).type for name in source.keep_columns}
    return pa.schema({ID: pa.string()} | kept | {ID: pa.string(), VECTOR: pa.list_(pa.float32(), source.dim)})


def lance_url(place: Folder) -> str:
    """The folder as Lance names it: a path of this machine, or a URL of the store's first scheme."""
    fs, path = filesystem(place.url, place.options)
    return path if atomic.is_local(fs) else fs.unstrip_protocol(path)


def lance_options(place: Folder) -> dict[str, str]:
    """The options of S3 and the environment's endpoint, as Lance names them; Lance reads the rest of the environment itself."""
    if not place.url.startswith(("s3://", "s3a://")):
        return {}
    options, client = place.options, place.options.get("client_kwargs", {})
    endpoint = options.get("endpoint_url") or client.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL")
    names = {
        "aws_access_key_id": options.get("key"),
        "aws_secret_access_key": options.get("secret"),
        "aws_session_token": options.get("token"),
        "aws_region": client.get("region_name"),
        "aws_endpoint": endpoint,
        "allow_http": "true" if str(endpoint).startswith("http://") else None,
    }
    return {name: str(value) for name, value in names.items() if value}


def metadata(row: Mapping[str, object]) -> str | None:
    """A row's columns as a JSON object of texts, numbers, bools and lists of texts, which Pinecone takes; None for an empty one.

    Any other value becomes its text; null and NaN are left out.
    """
    flat = {name: _flat(value) for name, value in row.items()}
    kept = {name: value for name, value in flat.items() if value is not None}
    return json.dumps(kept, ensure_ascii=False) if kept else None


def _flat(value: object) -> str | float | list[str] | None:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [str(each) for each in value if each is not None]
    return value if value is None or isinstance(value, int | str) else str(value)


def _parquet(table: pa.Table) -> memoryview:
    """Snappy, which every reader of Parquet knows; without dictionaries, which vectors only overflow."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="snappy", use_dictionary=False, row_group_size=ROW_GROUP)
    return sink.getbuffer()

"""What becomes of a shard's vectors for another store: a Parquet file that it imports, or fragments of a Lance dataset.

What the store reads is published before the part that tells of it. A Parquet file is named after its shard, so one that is
made again is the same one. A fragment is named at random: one that no part tells of is in no dataset.
"""

import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.shards import Shard
from ...engine.mapper import FusedMapper, Tables
from ...engine.parts import ROW_GROUP
from ...storage import atomic
from ...storage.filesystem import filesystem
from ...storage.folder import Folder
from ..build.layout import FACTS, FILE, VECTOR
from ..build.vector_source import Source

ID, METADATA = "id", "metadata"


def file_name(first: int, shard: Shard) -> str:
    """first: the index's number of the run's first shard."""
    return f"vectors-{first + shard.number:06d}-{shard.key}.parquet"


@dataclass(frozen=True)
class ExportFiles(FusedMapper):
    """The verb: a Parquet file of each shard's vectors in `place`; none where no row has one. A part has a row, FILE, for it.

    first: as in `file_name`. column: what the store calls a vector. described: with METADATA, of the carried columns.
    """

    source: Source
    place: Folder
    first: int
    column: str
    described: bool

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        return _prepared(self.source, shard)

    def worker(self) -> Callable[[Tables], Tables]:
        return self._work

    def _work(self, bundle: Tables) -> Tables:
        rows, vectors = bundle["rows"], bundle["vectors"][VECTOR]
        # Milvus takes neither large strings nor lists of a fixed size.
        data = {ID: rows[ID].cast(pa.string()), self.column: vectors.cast(pa.list_(pa.float32()))}
        if self.described:
            described = rows.select(list(self.source.carried)).to_pylist()
            data[METADATA] = pa.array([metadata(row) for row in described], pa.string())
        return {"rows": pa.table(data).replace_schema_metadata(rows.schema.metadata)}

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        rows, name = bundle["rows"], file_name(self.first, shard)
        if rows.num_rows:
            self.place.publish(name, _parquet(rows.replace_schema_metadata()))
        return _told([name] if rows.num_rows else [], {}, rows)


@dataclass(frozen=True)
class ExportFragments(FusedMapper):
    """The verb: each shard's vectors as fragments of the Lance dataset at `url`. A part has a row, FILE, for each, and in FACTS
    all that a commit is told of them, `fragments`. options: of the store, as Lance names them."""

    source: Source
    url: str
    options: Mapping[str, str] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        return _prepared(self.source, shard)

    def worker(self) -> Callable[[Tables], Tables]:
        return self._work

    def _work(self, bundle: Tables) -> Tables:
        rows, schema = bundle["rows"], lance_schema(self.source)
        columns = [bundle["vectors"][VECTOR] if name == VECTOR else rows[name] for name in schema.names]
        data = [column.cast(target) for column, target in zip(columns, schema.types, strict=True)]
        return {"rows": pa.table(data, schema=schema.with_metadata(rows.schema.metadata))}

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        from lance.fragment import write_fragments

        rows, made = bundle["rows"], []
        if rows.num_rows:
            # "overwrite" writes data files alone, and asks nothing of a dataset that may be there.
            plain = rows.replace_schema_metadata()
            made = write_fragments(plain, self.url, mode="overwrite", storage_options=dict(self.options))
        facts = {"fragments": [fragment.to_json() for fragment in made]}
        return _told([file.path for fragment in made for file in fragment.files], facts, rows)


def lance_schema(source: Source) -> pa.Schema:
    """ID, the carried columns as the input types them, VECTOR as a list of fixed size, which Lance can index."""
    carried = {name: source.columns.field(name).type for name in source.carried}
    return pa.schema({ID: pa.string()} | carried | {ID: pa.string(), VECTOR: pa.list_(pa.float32(), source.dim)})


def lance_url(place: Folder) -> str:
    """The folder as Lance names it: a path of this machine, or a URL of the store's first scheme."""
    fs, path = filesystem(place.url, place.options)
    return path if atomic.is_local(fs) else fs.unstrip_protocol(path)


def lance_options(place: Folder) -> dict[str, str]:
    """fsspec's options of S3, and the environment's endpoint, as Lance names them; the rest of the environment it reads itself."""
    if not place.url.startswith(("s3://", "s3a://")):
        return {}
    given, client = place.options, place.options.get("client_kwargs", {})
    endpoint = given.get("endpoint_url") or client.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL")
    found = {
        "aws_access_key_id": given.get("key"),
        "aws_secret_access_key": given.get("secret"),
        "aws_session_token": given.get("token"),
        "aws_region": client.get("region_name"),
        "aws_endpoint": endpoint,
        "allow_http": "true" if str(endpoint).startswith("http://") else None,
    }
    return {name: str(value) for name, value in found.items() if value}


def metadata(row: Mapping[str, object]) -> str | None:
    """A row's columns as a JSON object of texts, numbers, bools and lists of texts, which is what Pinecone takes; a value that
    is none of these is put as its text, null and NaN are left out. None where nothing is left."""
    flat = {name: _flat(value) for name, value in row.items()}
    kept = {name: value for name, value in flat.items() if value is not None}
    return json.dumps(kept, ensure_ascii=False) if kept else None


def _flat(value: object) -> str | float | list[str] | None:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [str(each) for each in value if each is not None]
    return value if value is None or isinstance(value, int | str) else str(value)


def _prepared(source: Source, shard: Shard) -> tuple[Tables, dict[str, float]]:
    """Of the rows with a vector, `rows` and `vectors`; in the metadata of `rows` how many were read, FACTS."""
    began = time.perf_counter()
    rows = source.read(shard)
    good = rows.good
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors[good].reshape(-1)), source.dim)
    facts = {FACTS: json.dumps({"read": len(good)})}
    table = rows.table.filter(pa.array(good)).replace_schema_metadata(facts)
    return {"rows": table, "vectors": pa.table({VECTOR: column})}, {"read": time.perf_counter() - began}


def _parquet(table: pa.Table) -> memoryview:
    """Snappy, which every reader of Parquet knows; without dictionaries, which vectors only overflow."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="snappy", use_dictionary=False, row_group_size=ROW_GROUP)
    return sink.getbuffer()


def _told(files: list[str], facts: Mapping[str, object], rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The part that tells of files, and its counts. rows: what was written, with what `_prepared` noted."""
    read = json.loads(rows.schema.metadata[FACTS])["read"]
    table = pa.table({FILE: pa.array(files, pa.string())}).replace_schema_metadata({FACTS: json.dumps(facts)})
    return table, {"rows": len(files), "source_rows": read, "errors": read - rows.num_rows}

"""The parts of a run: Parquet objects put in one step, each sealed with its counts and checksum, and their manifest."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import accumulate
from socket import gethostname
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RunError, StorageError
from ..storage.folder import Folder

RUN, MANIFEST = "_run.json", "_manifest.parquet"
NUMBERS = ("rows", "source_rows", "errors", "truncated", "tokens")  # counted in every part and summed in the report
FOOTER_THREADS = 32  # one request in flight each
ROW_GROUP = 32_768  # rows; an index build reads row groups, 128 MiB of 1024 float32 dimensions
SEAL, FACTS = b"shoal.part", b"shoal.facts"  # keys in a part's footer, each with JSON


@dataclass(frozen=True)
class Part:
    """A published part. `sha256` is of the file's first `data_bytes` bytes, all before the Parquet footer."""

    shard: int
    part: str
    bytes: int
    data_bytes: int
    sha256: str
    rows: int
    source_rows: int  # that were read for it
    errors: int
    truncated: int
    tokens: int


MANIFEST_SCHEMA = pa.schema([(each.name, pa.string() if each.type is str else pa.int64()) for each in fields(Part)])


def publish_part(
    folder: Folder,
    name: str,
    shard: int,
    table: pa.Table,
    numbers: Mapping[str, int],
    facts: Mapping[str, Any] | None = None,
    groups: Sequence[int] | None = None,
) -> Part:
    """Write `table` as one Parquet object in one step; numbers, facts and checksum stand in its footer. Raises StorageError.

    groups: rows of each row group, which are kept among the facts; without them a row group has ROW_GROUP rows.
    """
    if folder.is_local and not folder.exists(RUN):
        raise StorageError(
            f"{folder.url} on the node {gethostname()} is not the folder of this run. Workers on several nodes need an "
            "--output on a shared file system, or in an object store"
        )
    if groups is not None:
        groups = [int(rows) for rows in groups]
        facts = {**(facts or {}), "groups": groups}
    sink = io.BytesIO()
    fixed = (
        pa.types.is_fixed_size_list,
        pa.types.is_fixed_size_binary,
    )  # vectors and codes: no compressor makes them smaller
    vectors = [f.name for f in table.schema if any(is_fixed(f.type) for is_fixed in fixed)]
    compression = {leaf: "NONE" if leaf.split(".")[0] in vectors else "ZSTD" for leaf in _leaves(table.schema)}
    strings = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    with pq.ParquetWriter(sink, table.schema, compression=compression, use_dictionary=strings) as writer:
        if groups is None:
            writer.write_table(table, row_group_size=ROW_GROUP)
        for start, rows in zip(accumulate(groups or (), initial=0), groups or (), strict=False):
            if rows:  # a row group cannot be empty
                writer.write_table(table.slice(start, rows), row_group_size=rows)
        with sink.getbuffer() as data:  # every column chunk is there; closing adds the footer
            data_bytes, digest = len(data), hashlib.sha256(data).hexdigest()
        seal = {**numbers, "data_bytes": data_bytes, "sha256": digest}
        writer.add_key_value_metadata({SEAL: json.dumps(seal)} | ({FACTS: json.dumps(facts)} if facts else {}))
    with sink.getbuffer() as data:
        folder.publish(name, data)
        return Part(shard, name, len(data), data_bytes, digest, **{n: numbers.get(n, 0) for n in NUMBERS})


def read_manifest(folder: Folder) -> list[Part]:
    """The parts of the last audit that found every part; none before. A plan that has grown since has more shards."""
    try:
        table = pq.read_table(pa.BufferReader(folder.read(MANIFEST)))
    except FileNotFoundError:
        return []
    return [Part(**row) for row in table.to_pylist()]


def write_manifest(folder: Folder, parts: Sequence[Part]) -> None:
    folder.publish(MANIFEST, parquet_bytes(pa.Table.from_pylist([vars(part) for part in parts], MANIFEST_SCHEMA)))


def read_facts(folder: Folder, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The facts that each part was published with."""
    return [facts for _, facts in read_schemas(folder, parts)]


def read_schemas(folder: Folder, parts: Sequence[Part]) -> list[tuple[pa.Schema, dict[str, Any]]]:
    """Columns and facts of each part, by parallel reads of the footers."""

    def read(part: Part) -> tuple[pa.Schema, dict[str, Any]]:
        with folder.open(part.part) as file, pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow, json.loads(parquet.metadata.metadata.get(FACTS, b"{}"))

    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return list(threads.map(read, parts))


def read_footer(folder: Folder, shard: int, name: str, size: int) -> Part:
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        seal = json.loads(parquet.metadata.metadata[SEAL])
        rows = parquet.metadata.num_rows
    if rows != seal["rows"]:
        raise RunError(f"{name} holds {rows} rows and says {seal['rows']}: it is damaged. Delete it and start again")
    return Part(shard, name, size, seal["data_bytes"], seal["sha256"], **{n: seal.get(n, 0) for n in NUMBERS})


def _leaves(schema: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    empty = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [empty.column(i).path for i in range(len(empty))]


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()

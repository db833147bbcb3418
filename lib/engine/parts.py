"""The published parts of a run, and their manifest: what each part's footer and the last audit say of them."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RunError
from ..storage.folder import Folder

RUN, MANIFEST = "_run.json", "_manifest.parquet"
NUMBERS = ("rows", "source_rows", "errors", "truncated", "tokens")  # counted in every part and summed in the report
FOOTER_THREADS = 32  # one request in flight each
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


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()

"""Publishing a shard: its rows become one Parquet object, put in one step, sealed with its counts and checksum."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from socket import gethostname
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StorageError
from ..storage.folder import Folder
from .parts import FACTS, NUMBERS, RUN, SEAL, Part

ROW_GROUP = 32_768  # rows; an index build reads row groups, 128 MiB of 1024 float32 dimensions


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


def _leaves(schema: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    empty = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [empty.column(i).path for i in range(len(empty))]

"""What a stage takes of the parts that the stage before it left."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.reader import as_one_array
from ...data.shards import PLAN_SCHEMA, FileRange, Shard
from ...engine.mapper import FusedMapper, Tables
from ...engine.parts import FOOTER_THREADS, Part
from ...storage.filesystem import open_file
from ...storage.folder import Folder
from .layout import FACTS, HELD, VECTOR

PATHS = "paths"
SLICES = PLAN_SCHEMA.remove(0)


@dataclass(frozen=True)
class File:
    """An object that a stage left, and how many rows it holds."""

    path: str
    rows: int
    bytes: int


def files_of(folder: Folder, parts: Sequence[Part]) -> list[File]:
    return [File(folder.path(part.part), part.rows, part.bytes) for part in parts]


def files_plan(groups: Sequence[Sequence[File]]) -> tuple[pa.Table, pa.Schema]:
    """A shard for each group, in order; no column is read by the engine. What is published again is the same: no tag."""
    files = [(number, file) for number, group in enumerate(groups) for file in group]
    data = {
        "shard": [number for number, _ in files],
        "path": [file.path for _, file in files],
        "name": [file.path.rpartition("/")[2] for _, file in files],
        "start": [0] * len(files),
        "stop": [file.rows for _, file in files],
        "rows": [file.rows for _, file in files],
        "size": [file.bytes for _, file in files],
        "tag": [""] * len(files),
        "error": pa.nulls(len(files), pa.string()),
        "source": pa.nulls(len(files), pa.string()),
    }
    return pa.table(data, PLAN_SCHEMA), pa.schema([])


def some_shards(plan: pa.Table, first: int, stop: int) -> pa.Table:
    """The plan of some of its shards, numbered from 0."""
    shards = plan.filter(pc.and_(pc.greater_equal(plan["shard"], first), pc.less(plan["shard"], stop)))
    return shards.set_column(0, PLAN_SCHEMA.field(0), pc.subtract(shards["shard"], first))


def paths_of(shard: Shard) -> pa.Table:
    """What the worker gets of a shard that it reads itself: its slices."""
    return pa.Table.from_pylist([asdict(piece) for piece in shard.ranges], SLICES)


def shard_of(paths: pa.Table) -> Shard:
    """The shard again, but for its number."""
    return Shard(0, tuple(FileRange(**row) for row in paths.to_pylist()))


@dataclass(frozen=True)
class OfParts(FusedMapper):
    """What verbs have in common whose worker reads a shard's parts itself and leaves `rows`."""

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        return {PATHS: paths_of(shard)}, {}

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        return bundle["rows"], {"rows": bundle["rows"].num_rows, "source_rows": shard.rows}


def read_parts(paths: pa.Table, columns: Sequence[str], storage: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The parts, one at a time."""
    for path in paths["path"].to_pylist():
        with open_file(path, storage) as file:
            yield pq.read_table(file, columns=list(columns))


def ids_of(rows: Folder, parts: Sequence[Part]) -> pa.Array:
    """The ids of encoded rows, large_string, of those too that have no vector."""
    chunks = []
    for part in parts:
        with rows.open(part.part) as file:
            chunks.append(pq.read_table(file, columns=["id"])["id"].combine_chunks())
    return pa.concat_arrays(chunks)


def column(rows: np.ndarray) -> pa.Array:
    """Numbers, [n, width], as a value of so many bytes a row, not copied. Parquet reads and writes these in a fifth of the time
    that lists take."""
    rows = np.ascontiguousarray(rows)
    return pa.Array.from_buffers(pa.binary(rows.shape[1] * rows.itemsize), len(rows), [None, pa.py_buffer(rows)])


def matrix(values: pa.ChunkedArray, type: type[np.generic] = np.float32) -> np.ndarray:
    """The numbers of a `column` without nulls again, [n, width]; a view where they lie together."""
    array = as_one_array(values)
    assert not array.null_count, "a row without a vector"
    size = array.type.byte_width
    flat = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * size : (array.offset + len(array)) * size]
    return flat.reshape(-1, size).view(type)


def read_training_vectors(paths: pa.Table, dim: int, storage: Mapping[str, Any]) -> np.ndarray:
    """The vectors of a sample that are there to train on, float32 [n, dim]. Memory: those, and one part."""
    found = np.empty((sum(paths["rows"].to_pylist()), dim), np.float32)
    start = 0
    for table in read_parts(paths, [VECTOR, HELD], storage):
        vectors = matrix(table[VECTOR])[pc.sum(table[HELD]).as_py() or 0 :]  # those that are held lie first
        found[start : start + len(vectors)] = vectors
        start += len(vectors)
    return found[:start]


def facts_of(folder: Folder, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What each part's shard found out."""

    def read(part: Part) -> dict[str, Any]:
        with folder.open(part.part) as file, pq.ParquetFile(file) as parquet:
            return json.loads((parquet.schema_arrow.metadata or {}).get(FACTS, b"{}"))

    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return list(threads.map(read, parts))

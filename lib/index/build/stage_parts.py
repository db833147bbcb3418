"""The parts that one stage of a build leaves to the next: plans of them, and their rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.shards import PLAN_SCHEMA
from ...data.vectors import as_matrix
from ...engine.parts import Part
from ...storage.filesystem import open_file
from ...storage.folder import Folder
from .layout import HELD_OUT, VECTOR


@dataclass(frozen=True)
class StageFile:
    """An object that a stage wrote, with its number of rows."""

    path: str
    rows: int
    bytes: int


def files_of(folder: Folder, parts: Sequence[Part]) -> list[StageFile]:
    return [StageFile(folder.path(part.part), part.rows, part.bytes) for part in parts]


def files_plan(groups: Sequence[Sequence[StageFile]]) -> tuple[pa.Table, pa.Schema]:
    """A shard for each group of files, in order. The files have no tag: one that is published again is the same file."""
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
    """The plan of the shards from `first` to before `stop`, numbered from 0."""
    shards = plan.filter(pc.and_(pc.greater_equal(plan["shard"], first), pc.less(plan["shard"], stop)))
    return shards.set_column(0, PLAN_SCHEMA.field(0), pc.subtract(shards["shard"], first))


def rows_of_shards(plan: pa.Table) -> np.ndarray:
    """int64 [shards]: the rows of each shard of a plan."""
    return plan.group_by("shard", use_threads=False).aggregate([("rows", "sum")])["rows_sum"].to_numpy()


def read_parts(paths: Sequence[str], columns: Sequence[str], storage: Mapping[str, Any]) -> Iterator[pa.Table]:
    """The parts, one at a time."""
    for path in paths:
        with open_file(path, storage) as file:
            yield pq.read_table(file, columns=list(columns))


def ids_of(rows: Folder, parts: Sequence[Part]) -> pa.Array:
    """The ids of encoded rows, large_string, also of rows without a vector."""
    paths = [rows.path(part.part) for part in parts]
    return pa.concat_arrays([table["id"].combine_chunks() for table in read_parts(paths, ["id"], rows.options)])


def binary_column(rows: np.ndarray) -> pa.Array:
    """Numbers, [n, width], as fixed-size binary values, not copied; `as_matrix` reads them.

    Parquet writes and reads these in a fifth of the time of lists.
    """
    rows = np.ascontiguousarray(rows)
    return pa.Array.from_buffers(pa.binary(rows.shape[1] * rows.itemsize), len(rows), [None, pa.py_buffer(rows)])


def read_training_vectors(files: Sequence[Any], dim: int, storage: Mapping[str, Any]) -> np.ndarray:
    """The training vectors of parts of the sample, float32 [n, dim]. Memory: those, and one part.

    files: with `path` and `rows`, as a shard's ranges.
    """
    sample = np.empty((sum(file.rows for file in files), dim), np.float32)
    start = 0
    for table in read_parts([file.path for file in files], [VECTOR, HELD_OUT], storage):
        held_out = pc.sum(table[HELD_OUT]).as_py() or 0  # these rows come first
        vectors = as_matrix(table[VECTOR], np.float32)[held_out:]
        sample[start : start + len(vectors)] = vectors
        start += len(vectors)
    return sample[:start]

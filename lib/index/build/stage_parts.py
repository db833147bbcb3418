"""The parts that one stage of a build leaves to the next: plans of them, and their rows."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...data.shards import PLAN_SCHEMA
from ...data.vectors import as_matrix
from ...engine.parts import FOOTER_THREADS, Part
from ...storage.filesystem import open_file
from ...storage.folder import Folder
from .layout import HELD_OUT, VECTOR

BUFFER = 1 << 16  # bytes: only a little of a part is read
T = TypeVar("T")


def group_neighbours(items: Sequence[T], groups: np.ndarray) -> list[list[T]]:
    """Neighbouring items that have the same number in `groups`, [items]."""
    pairs = zip(items, groups.tolist(), strict=True)
    return [[item for item, _ in group] for _, group in groupby(pairs, key=itemgetter(1))]


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


def read_row_groups(
    paths: Sequence[str], place: int, columns: Sequence[str], condition: pc.Expression, storage: Mapping[str, Any]
) -> pa.Table:
    """The rows on a condition of one row group of each part: the first one where `place` is 0, the last one where it is -1."""

    def read(path: str) -> pa.Table:
        with open_file(path, storage, BUFFER) as file, pq.ParquetFile(file) as parquet:
            groups = range(parquet.num_row_groups)
            table = parquet.read_row_groups([groups[place]] if groups else [], columns=list(columns))
            return table.filter(condition)

    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return pa.concat_tables(threads.map(read, paths))


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

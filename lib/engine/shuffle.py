"""Rows dealt into buckets by a key, over any number of parts: how the exactly-once map joins and groups tables.

A map over the shards of a table sorts each part's rows by bucket, a row group a bucket. The next map has a shard for each
bucket: its rows in all those parts, a range of rows in each. Nothing is held in memory but one shard.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.shards import PLAN_SCHEMA
from ..storage.folder import Folder
from .parts import FOOTER_THREADS, GROUPS, Part, groups_of, read_manifest

KEY, TEXT, REASON = "_key", "_text", "_reason"  # columns of dealt tables: large_string, large_string, string
PIECES = 200  # shards and buckets that a table is cut into, where bytes allow it: every pair of both is a range to read
LEAST_PIECE, MOST_PIECE = 64 << 20, 1 << 30  # bytes; a process holds a few times as much
MOST_RANGES = 5_000_000  # in a plan, 200 bytes each in the driver


def piece_bytes(total: float) -> float:
    """Bytes of a shard, and of a bucket, where `total` bytes are dealt: their numbers' product is the ranges to read."""
    return min(max(total / PIECES, LEAST_PIECE), MOST_PIECE)


def bucket_numbers(keys: pa.Array, buckets: int) -> np.ndarray:
    """int64 [n]: the bucket of each key (strings; nulls, which match nothing, one after the other). The same everywhere."""
    from pandas.util import hash_array

    words = pc.fill_null(keys, "").to_numpy(zero_copy_only=False).astype(object)
    hashed = (hash_array(words, categorize=False) % np.uint64(buckets)).astype(np.int64)
    absent = keys.is_null().to_numpy(zero_copy_only=False)
    return np.where(absent, np.arange(len(keys)) % buckets, hashed)


def partition(table: pa.Table, buckets: int) -> pa.Table:
    """The rows in the order of the buckets of their KEY, and within one as they were; GROUPS tells how many are in each."""
    numbers = bucket_numbers(table[KEY].combine_chunks(), buckets)
    groups = np.bincount(numbers, minlength=buckets)
    dealt = table.take(pa.array(np.argsort(numbers, kind="stable")))
    return dealt.replace_schema_metadata({GROUPS: json.dumps(groups.tolist())})


def bucket_plan(sources: Mapping[str, Folder]) -> tuple[pa.Table, pa.Schema]:
    """A plan with a shard for each bucket of the dealt parts in `sources`, and all their columns.

    A slice's name begins with the name of its source. Buckets without a row have no shard. Parts have no tag: one that is
    published again is the same part.
    """
    parts = [(name, part) for name, folder in sources.items() for part in read_manifest(folder)]
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        schemas = list(threads.map(lambda each: _schema(sources[each[0]], each[1].part), parts))
    pieces = [_ranges(n, sources[n], part, groups_of(s)) for (n, part), s in zip(parts, schemas, strict=True)]
    plan = pa.concat_tables([PLAN_SCHEMA.empty_table(), *pieces]).sort_by([("shard", "ascending")])
    _, numbers = np.unique(plan["shard"].to_numpy(), return_inverse=True)
    columns = pa.unify_schemas([schema.remove_metadata() for schema in schemas])
    return plan.set_column(0, PLAN_SCHEMA.field(0), pa.array(numbers, pa.int64())), columns


def _schema(folder: Folder, name: str) -> pa.Schema:
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        return parquet.schema_arrow


def _ranges(source: str, folder: Folder, part: Part, groups: np.ndarray) -> pa.Table:
    """Slices of one part: its row range of each bucket that it has rows of."""
    stops, held = np.cumsum(groups), np.flatnonzero(groups)
    count = len(held)
    data = {
        "shard": held,
        "path": [folder.path(part.part)] * count,
        "name": [f"{source}/{part.part}"] * count,
        "start": (stops - groups)[held],
        "stop": stops[held],
        "rows": groups[held],
        "size": [part.bytes] * count,
        "tag": [""] * count,
        "error": pa.nulls(count, pa.string()),
    }
    return pa.table(data, PLAN_SCHEMA)


def attach(left: pa.Table, right: pa.Table, name: str) -> pa.Table:
    """Every row of `left` with column `name`: the TEXT of the first row of `right` with its KEY.

    Where there is none, or it has no text, `name` is null and REASON, unless it has one, says why.
    """
    place = pc.index_in(left[KEY].combine_chunks(), value_set=right[KEY].combine_chunks(), skip_nulls=True)
    text, why = right[TEXT].combine_chunks().take(place), right[REASON].combine_chunks().take(place)
    key = pc.fill_null(left[KEY].combine_chunks().cast(pa.string()), "null")
    nothing = pc.binary_join_element_wise(pa.scalar(f"no {name} with the id "), key, pa.scalar(""))
    absent = pc.if_else(pc.is_null(place), nothing, pa.scalar(None, pa.string()))
    unfit = pc.binary_join_element_wise(pa.scalar(f"{name}: "), why, pa.scalar(""))
    reasons = pc.coalesce(left[REASON].combine_chunks(), absent, unfit)
    left = left.append_column(name, text)
    return left.set_column(left.schema.get_field_index(REASON), REASON, reasons)

"""Hash partitioning over any number of parts, for joins and groups in the exactly-once map.

One map over the shards of a table sorts the rows of each part by bucket; every bucket is a row group. The next map has a shard
for each bucket: a range of rows in each of those parts. Memory: one shard.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.shards import PLAN_SCHEMA
from ..storage.folder import Folder
from .parts import Part, read_manifest, read_schemas

KEY, TEXT, REASON = "_key", "_text", "_reason"  # columns of partitioned tables: large_string, large_string, string
PARTITIONS = 200  # shards of a table, and buckets, where bytes allow it: each pair of the two is a range to read
MIN_BYTES, MAX_BYTES = 64 << 20, 1 << 30  # of a shard and of a bucket; a process needs a few times as much
MAX_RANGES = 5_000_000  # of a plan; each takes 200 bytes in the driver


def partition_bytes(total: float) -> float:
    """Bytes of a shard, and of a bucket, when `total` bytes are partitioned. The ranges to read are shards times buckets."""
    return min(max(total / PARTITIONS, MIN_BYTES), MAX_BYTES)


def bucket_numbers(keys: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each key (strings), int64 [n]: its hash modulo `buckets`. Null keys match nothing and go to all in turn."""
    from pandas.util import hash_array

    words = pc.fill_null(keys, "").to_numpy(zero_copy_only=False).astype(object)
    hashed = (hash_array(words, categorize=False) % np.uint64(buckets)).astype(np.int64)
    absent = keys.is_null().to_numpy(zero_copy_only=False)
    return np.where(absent, np.arange(len(keys)) % buckets, hashed)


def partition(table: pa.Table, buckets: int) -> tuple[pa.Table, list[int]]:
    """Sort the rows by the bucket of their KEY, keeping their order inside a bucket. Also returns the rows of each bucket."""
    numbers = bucket_numbers(table[KEY].combine_chunks(), buckets)
    groups = np.bincount(numbers, minlength=buckets)
    return table.take(pa.array(np.argsort(numbers, kind="stable"))), groups.tolist()


def bucket_plan(sources: Mapping[str, Folder]) -> tuple[pa.Table, pa.Schema]:
    """A plan with a shard for each bucket of the partitioned parts in `sources`, and all their columns.

    A file range has the name of its source. Buckets without a row have no shard. Parts have no tag: a part that is published
    again has the same rows.
    """
    plans, schemas = [PLAN_SCHEMA.empty_table()], []
    for source, folder in sources.items():
        parts = read_manifest(folder)
        for part, (schema, facts) in zip(parts, read_schemas(folder, parts), strict=True):
            plans.append(_ranges(source, folder, part, np.array(facts["groups"], np.int64)))
            schemas.append(schema.remove_metadata())
    plan = pa.concat_tables(plans).sort_by([("shard", "ascending")])
    _, numbers = np.unique(plan["shard"].to_numpy(), return_inverse=True)
    return plan.set_column(0, PLAN_SCHEMA.field(0), pa.array(numbers, pa.int64())), pa.unify_schemas(schemas)


def _ranges(source: str, folder: Folder, part: Part, groups: np.ndarray) -> pa.Table:
    """The rows of one part as ranges, one for each bucket with rows."""
    stops, filled = np.cumsum(groups), np.flatnonzero(groups)
    data = {"shard": filled, "start": (stops - groups)[filled], "stop": stops[filled], "rows": groups[filled]}
    same = {"path": folder.path(part.part), "name": part.part, "size": part.bytes, "tag": "", "source": source}
    data |= {name: [value] * len(filled) for name, value in {**same, "error": None}.items()}
    return pa.table(data, PLAN_SCHEMA)


def attach(left: pa.Table, right: pa.Table, name: str) -> pa.Table:
    """Add column `name` to `left`: the TEXT of the first row of `right` with the same KEY.

    Where no row matches, or its text is null, `name` is null, and REASON gets the reason unless it has one.
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

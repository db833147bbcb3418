"""Hash partitioning and joins by bucket, without a model and without Ray."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.reader import read_rows
from lib.data.shards import shards
from lib.engine.join import as_key
from lib.engine.parts import RUN, Part, read_facts, write_manifest
from lib.engine.publish import publish_part
from lib.engine.shuffle import KEY, REASON, TEXT, attach, bucket_numbers, bucket_plan, partition
from lib.storage.folder import Folder


def keys(count, first=0):
    return pa.array([f"key {i}" for i in range(first, first + count)], pa.large_string())


def publish_partitioned(folder: Folder, number: int, table: pa.Table, buckets: int) -> Part:
    table, groups = partition(table, buckets)
    return publish_part(folder, f"part-{number}.parquet", number, table, {"rows": table.num_rows}, groups=groups)


def test_the_bucket_of_a_key_never_changes():
    """The bucket of a key does not depend on process, run or other keys: a resumed join partitions as the first one did."""
    numbers = bucket_numbers(keys(1000), 7)

    assert numbers[:8].tolist() == [4, 5, 1, 5, 1, 0, 6, 1]
    assert np.array_equal(bucket_numbers(keys(500, 500), 7), numbers[500:])
    assert min(np.bincount(numbers)) > 100
    assert bucket_numbers(pa.array([None, None], pa.large_string()), 7).tolist() == [0, 1]


def test_whole_numbers_are_the_same_keys_in_any_column():
    """Equal digits are equal keys, whether the column is of integers, or of floats because one of them is null."""
    assert as_key(pa.chunked_array([[1, 12345678901, None]]))[0].to_pylist() == ["1", "12345678901", None]
    assert as_key(pa.chunked_array([[1.0, 12345678901.0, None]]))[0].to_pylist() == ["1", "12345678901", None]
    assert as_key(pa.chunked_array([["01", None]]))[0].to_pylist() == ["01", None]


def test_buckets_of_many_parts_have_every_row_once(tmp_path):
    """Each bucket of the plan reads its rows of every part, in order, and no other; empty buckets have no shard."""
    folder = Folder(str(tmp_path))
    folder.publish(RUN, b"{}")
    parts = []
    for number in range(3):
        table = pa.table({KEY: keys(40, number * 40), "place": range(number * 40, number * 40 + 40)})
        parts.append(publish_partitioned(folder, number, table, 50))
    write_manifest(folder, parts)
    plan, columns = bucket_plan({"left": folder})

    places = []
    for shard in shards(plan):
        rows = read_rows(shard, ["place", KEY], columns, {})
        assert len(set(bucket_numbers(rows[KEY].combine_chunks(), 50))) == 1
        assert rows["place"].to_pylist() == sorted(rows["place"].to_pylist())
        assert len(rows) == shard.rows
        places += rows["place"].to_pylist()
    assert sorted(places) == list(range(120))
    assert [shard.number for shard in shards(plan)] == list(range(len(set(bucket_numbers(keys(120), 50)))))


def test_a_part_keeps_buckets_in_row_groups_of_their_own(tmp_path):
    """A bucket is read without its neighbours: no row group holds rows of two."""
    folder = Folder(str(tmp_path))
    folder.publish(RUN, b"{}")
    part = publish_partitioned(folder, 0, pa.table({KEY: keys(100)}), 9)
    with pq.ParquetFile(Path(tmp_path, part.part)) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    groups = read_facts(folder, [part])[0]["groups"]

    assert sizes == [size for size in groups if size]
    assert len(groups) == 9


def table(pairs, **more):
    data = {KEY: pa.array([key for key, _ in pairs], pa.large_string())}
    data |= more or {TEXT: pa.array([text for _, text in pairs], pa.large_string())}
    return pa.table(data | {REASON: pa.nulls(len(pairs), pa.string())})


def test_every_row_is_joined_once_or_says_why_not():
    """The first text of a doubled id counts; an unknown id, a null id and an unfit text have different reasons."""
    right = table([("a", "first"), ("b", None), ("a", "second"), (None, "nobody's")])
    right = right.set_column(2, REASON, pa.array([None, "empty text", None, None], pa.string()))
    left = table([(key, "") for key in ("a", "b", "x", None, "a")], row=range(5))
    joined = attach(left, right, "passage")

    assert joined["row"].to_pylist() == list(range(5))
    assert joined["passage"].to_pylist() == ["first", None, None, None, "first"]
    assert joined[REASON].to_pylist() == [
        None,
        "passage: empty text",
        "no passage with the id x",
        "no passage with the id null",
        None,
    ]


@pytest.mark.parametrize("rows", [0, 5])
def test_an_empty_side_is_no_error(rows):
    """A bucket may hold candidates and no passage, or the other way round."""
    left = table([("a", "")] * rows, row=range(rows))
    assert attach(left, table([]), "passage")["passage"].to_pylist() == [None] * rows
    assert attach(left, table([("a", "text")]), "passage")["passage"].to_pylist() == ["text"] * rows

"""The plan of shards: their keys, and ranges of several sources in one shard."""

from dataclasses import replace

import pyarrow as pa

from lib.data.shards import PLAN_SCHEMA, FileRange, Shard, number_shards, of_source, shards, tables_of

PARQUET = FileRange("/data/a b.parquet", "a b.parquet", 0, 100, 100, 4096, "tag'1", None)
DAMAGED = FileRange("s3://bucket/b.jsonl", "b.jsonl", 5, 900, -1, 1000, "eä", "unreadable file: cut")


def test_a_shard_keeps_its_key():
    """Keys name parts and seed samples: another key for the same ranges would break every resume and every sample."""
    assert Shard(3, (PARQUET,)).key == "f515828cadad"
    assert Shard(0, (PARQUET, DAMAGED)).key == "36437ed13b15"
    of_queries = FileRange("/out/part-0.parquet", "part-0.parquet", 0, 7, 7, 4096, "", None, "queries")
    assert Shard(0, (of_queries,)).key == "2f195061cfe9"
    assert Shard(0, ()).key == "2e38e77b22c3"


def test_a_key_depends_on_every_value_of_a_range():
    changes = {
        "path": "x",
        "name": "x",
        "start": 1,
        "stop": 99,
        "rows": 99,
        "size": 1,
        "tag": "",
        "error": "",
        "source": "x",
    }
    changed = [replace(PARQUET, **{name: value}) for name, value in changes.items()]
    assert len({Shard(0, (each,)).key for each in [PARQUET, *changed]}) == len(changes) + 1
    assert Shard(0, (PARQUET,)).key == Shard(1, (PARQUET,)).key


def test_ranges_of_several_sources_in_one_shard():
    """A joined job reads each source's ranges by themselves, under the names that they have without it."""
    rows = [{"shard": number, **vars(each)} for number, each in ((0, PARQUET), (0, DAMAGED), (1, PARQUET))]
    plan = pa.Table.from_pylist(rows, PLAN_SCHEMA)
    left, right = tables_of(plan, "left"), tables_of(plan, "right")
    joined = number_shards([pa.concat_tables(pair) for pair in zip(left, right, strict=True)])
    first, second = shards(joined)

    assert [each.name for each in of_source(first, "left").ranges] == ["a b.parquet", "b.jsonl"]
    assert of_source(second, "right").ranges == (replace(PARQUET, source="right"),)
    assert of_source(second, "other").ranges == ()
    assert of_source(second, "left").key != of_source(second, "right").key
    assert list(shards(plan))[1].ranges == (PARQUET,)

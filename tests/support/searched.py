"""A search of an index, and what it found. For the tests of searches."""

import pyarrow as pa
import pyarrow.parquet as pq

from lib.cli.options import configure
from lib.index.search.job import search
from lib.index.search.query import SearchConfig


def found(tmp_path, asked, name="found", **more) -> pa.Table:
    config = configure(
        SearchConfig, index=str(tmp_path / "index"), input=str(asked), output=str(tmp_path / name), **more
    )
    search(config)
    return pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / name).glob("part-*")))


def lists_of(table: pa.Table) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for row in table.to_pylist():
        if row["passage_id"] is not None:
            lists.setdefault(row["query_id"], []).append(row["passage_id"])
    return lists

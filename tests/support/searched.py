"""A search of an index in this process, and its hits. For the tests of searches."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.cli.options import configure
from lib.index.search.config import SearchConfig
from lib.index.search.job import search


def config_of(folder: Path, queries: Path, name: str = "hits", **more: Any) -> SearchConfig:
    """The config of a search of `folder`/index."""
    urls = {"index": str(folder / "index"), "input": str(queries), "output": str(folder / name)}
    return configure(SearchConfig, **(urls | {"executor": "local"} | more))


def hits_of(folder: Path, queries: Path, name: str = "hits", **more: Any) -> pa.Table:
    """The rows that a search of `folder`/index writes into `folder`/name."""
    search(config_of(folder, queries, name, **more))
    return read_hits(folder / name)


def read_hits(output: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(output.glob("part-*")))


def lists_of(table: pa.Table) -> dict[str, list[str]]:
    """The passages of each query, in order."""
    lists: dict[str, list[str]] = {}
    for row in table.to_pylist():
        if row["passage_id"] is not None:
            lists.setdefault(row["query_id"], []).append(row["passage_id"])
    return lists

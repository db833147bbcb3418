"""A small corpus, and the embed job on it in this process."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lib.cli.options import configure
from lib.embedding.config import EmbedConfig
from lib.embedding.job import embed
from tests.support.messages import listen

TEXTS = [f"document {i} " + "about fish and water " * (i % 9) for i in range(300)]


def write_docs(folder: Path) -> Path:
    """One Parquet file of 300 rows in a new folder below `folder`."""
    (folder / "in").mkdir()
    table = pa.table({"id": [f"d{i}" for i in range(300)], "text": TEXTS, "n": range(300)})
    pq.write_table(table, folder / "in" / "a.parquet")
    return folder / "in"


def config(docs, minilm, **changes):
    settings = {"input": str(docs), "output": str(docs.parent / "out"), "model": minilm, "dtype": "float32"}
    settings["max_workers"] = 1  # half the time of a small run is the start of its workers
    return configure(EmbedConfig, **(settings | changes))


def run(*words, **changes):
    said = listen()
    outcome = embed(config(*words, **changes))
    return outcome, said


def run_here(*words, **changes):
    """The same job in this process, without Ray."""
    return run(*words, **({"executor": "local"} | changes))


def rows(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("part-*.parquet")))


def matrix(table):
    column = table["embedding"].combine_chunks()
    return column.values.to_numpy().reshape(len(column), -1)

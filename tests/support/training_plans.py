"""Training plans of a few rows, by the local executor, and their steps and files."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lib.engine.workers import CpuWorkerOptions
from lib.training.data.batch_reader import BatchReader
from lib.training.data.job import TrainingPlan

LOCAL = CpuWorkerOptions(executor="local")


def pairs(count: int, first: int = 0, negatives: int = 3, **more: Any) -> list[dict[str, Any]]:
    rows = []
    for i in range(first, first + count):
        row = {"query": f"query {i}", "pos": [f"positive {i}"], "neg": [f"negative {i} {j}" for j in range(negatives)]}
        rows.append(row | more)
    return rows


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def steps(planned: TrainingPlan) -> list[pa.Table]:
    """The global batch of every step."""
    reader = BatchReader(planned.url)
    return [reader.read(step) for step in range(reader.steps)]


def partitioned(planned: TrainingPlan, name: str) -> pa.Table:
    """All rows that the first map published for one --data."""
    folder = os.path.join(planned.url, f"pairs-{name}")
    parts = sorted(part for part in os.listdir(folder) if part.startswith("part-"))
    return pa.concat_tables([pq.read_table(os.path.join(folder, part)) for part in parts])


def files(planned: TrainingPlan) -> dict[str, bytes]:
    """The bytes of every part and of the order, by path."""
    contents = {}
    for folder, _, names in os.walk(planned.url):
        for name in names:
            if name.startswith(("part-", "order")):
                path = Path(folder, name)
                contents[str(path.relative_to(planned.url))] = path.read_bytes()
    return contents


def content(planned: TrainingPlan) -> tuple[dict[str, bytes], list[tuple[str, int]]]:
    """Parts and order without the hash in the name of a part, which depends on the paths of its input."""
    parts = {name[: name.rindex("-")]: data for name, data in files(planned).items() if "part-" in name}
    order = pq.read_table(os.path.join(planned.url, "order.parquet"))
    return parts, [(row["part"].rpartition("-")[0], row["group"]) for row in order.to_pylist()]

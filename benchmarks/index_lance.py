"""lance-ray's distributed index of the same Parquet files, run by the Python of its own environment.

    LANCE_VENV/bin/python benchmarks/index_lance.py SETTINGS.json TOLD.json

SETTINGS: input (folder), dataset (folder to write), rows_a_file, workers; index (arguments of lance_ray.create_index);
questions (an .npz file of float32 [n, dim] each), probes, most; found (the .npz file to write). TOLD gets the seconds; the
.npz file the numbers found, int64 [n, most], by questions and probes. A row's id is its number.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lance
import lance_ray
import numpy as np
import ray


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy(settings: dict[str, Any]) -> None:
    """Files of as many rows as the Parquet has: one for every worker to take, and then another."""
    rows = settings["rows_a_file"]
    parquet = ray.data.read_parquet(settings["input"], columns=["id", "embedding"])
    lance_ray.write_lance(parquet, settings["dataset"], min_rows_per_file=rows, max_rows_per_file=rows)


def build(settings: dict[str, Any]) -> None:
    lance_ray.create_index(
        settings["dataset"], "embedding", name="vectors", num_workers=settings["workers"], **settings["index"]
    )


def search(dataset: lance.LanceDataset, settings: dict[str, Any], asked: np.ndarray, probes: int) -> np.ndarray:
    """Numbers found, int64 [n, most]; -1 where there are fewer."""
    most = settings["most"]
    nearest = {"column": "embedding", "q": asked, "k": most, "nprobes": probes, "approx_mode": "accurate"}
    table = dataset.to_table(columns=["id", "_distance"], nearest=nearest)
    query, distance = (table[name].to_numpy() for name in ("query_index", "_distance"))
    numbers = np.array(table["id"].to_pylist(), np.int64)
    order = np.lexsort((numbers, distance, query))
    query, numbers = query[order], numbers[order]
    rank = np.arange(len(query)) - np.searchsorted(query, np.arange(len(asked)))[query]
    found = np.full((len(asked), most), -1, np.int64)
    found[query[rank < most], rank[rank < most]] = numbers[rank < most]
    return found


def main(settings_file: str, told_file: str) -> None:
    settings = json.loads(Path(settings_file).read_text())
    told: dict[str, Any] = {
        "ray": timed(lambda: ray.init(address="local", log_to_driver=False, include_dashboard=False))
    }
    told["copy"] = timed(lambda: copy(settings))
    told["build"] = timed(lambda: build(settings))
    dataset = lance.dataset(settings["dataset"])
    fragments = dataset.get_fragments()
    told |= {"rows": dataset.count_rows(), "fragments": len(fragments)}
    told["bytes"] = sum(
        file.stat().st_size for file in Path(settings["dataset"], "_indices").rglob("*") if file.is_file()
    )
    told["versions"] = {name: version(name) for name in ("lance-ray", "pylance", "ray", "numpy", "pyarrow")}
    began, found = time.perf_counter(), {}
    for name, asked in np.load(settings["questions"]).items():
        for probes in settings["probes"]:
            found[f"{name}-{probes}"] = search(dataset, settings, asked, probes)
    told["search"] = time.perf_counter() - began
    np.savez(settings["found"], **found)
    Path(told_file).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])

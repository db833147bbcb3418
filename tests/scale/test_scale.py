"""The figures that a billion rows stand on. Run by `make scale`: minutes, not seconds."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from lib.cli.options import configure
from lib.cli.progress import Progress
from lib.data.corpus import CorpusOptions
from lib.data.reader import read_rows
from lib.data.shards import PLAN_SCHEMA, Shard, count_shards
from lib.embedding.config import EmbedConfig
from lib.embedding.job import embed
from lib.engine.executor import execute
from lib.engine.mapper import Result, Tables
from lib.engine.planner import CorpusPlanner
from lib.engine.publish import publish_part
from lib.engine.run import Run, missing
from lib.engine.workers import WorkerOptions, WorkerRequest
from lib.storage.folder import Folder

SHARDS, SHARD_ROWS, FILES = 200_000, 50, 100


@dataclass(frozen=True)
class Copy:
    """A mapper that copies a column, so that the engine alone is measured."""

    columns: pa.Schema

    def read(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        return {"rows": read_rows(shard, ["text"], self.columns, {})}, {}

    def load(self) -> Callable[[Tables], Tables]:
        return lambda tables: tables

    def to_result(self, shard: Shard, tables: Tables) -> Result:
        rows = tables["rows"].select(["text"])
        return Result(rows, {"source_rows": len(rows)})


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_planning_and_resuming_200_000_shards(tmp_path):
    """Planning 200,000 shards, and resuming a run of which all but ten are done, stay under 2 GB and 2 minutes in the
    driver. The input is real (100 files, 10 million short rows), so is the listing of 199,990 parts; they are empty."""
    program = "import sys; from tests.scale import test_scale; test_scale.drive(sys.argv[1])"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ["PYTHONPATH"]])  # for Ray's workers
    line = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": path})
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = dict(line.split(" ", 1) for line in done.stdout.splitlines())

    assert int(figures["shards"]) == SHARDS
    assert int(figures["pending"]) == 10
    assert int(figures["parts"]) == SHARDS
    assert float(figures["seconds"]) < 120
    assert float(figures["peak_mib"]) < 2048


def drive(folder: str) -> None:
    """Plan, publish all parts but ten, resume. In a process of its own, whose peak of memory is that of the driver."""
    root = Path(folder)
    (root / "in").mkdir()
    table = pa.table({"text": [f"t{i}" for i in range(SHARDS * SHARD_ROWS // FILES)]})
    for i in range(FILES):
        pq.write_table(table, root / "in" / f"{i:03d}.parquet", row_group_size=SHARD_ROWS * 20)
    out = Folder(str(root / "out"))
    out.probe()
    began = time.monotonic()
    run = _open(root / "in", out)
    print("shards", count_shards(run.plan))
    planned = time.monotonic() - began
    print(f"planning_seconds {planned:.1f}")
    _publish_most(run, root / "out")
    began = time.monotonic()
    run = _open(root / "in", out)
    pending = missing(run)
    print("pending", len(pending))
    os.environ["RAY_ADDRESS"] = "local"
    workers = WorkerRequest(WorkerOptions()).resolve()
    outcome = execute(Copy(run.columns), run, workers, Progress(SHARDS), pending)
    print("parts", len(outcome.parts))
    print(f"resuming_seconds {time.monotonic() - began:.1f}")
    print(f"seconds {planned + time.monotonic() - began:.1f}")
    print(f"peak_mib {peak_mib():.0f}")
    assert run.plan.schema == PLAN_SCHEMA


def _open(source: Path, output: Folder) -> Run:
    options = CorpusOptions(input=str(source), shard_rows=SHARD_ROWS)
    planner = CorpusPlanner(options, {}, lambda corpus, workers: SHARD_ROWS, WorkerRequest(WorkerOptions()))
    return Run.open(output, {"job": "copy"}, planner, {})


def _publish_most(run: Run, folder: Path) -> None:
    """Publish a part of every shard but the last ten: one real part, under every name."""
    names = run.part_names()
    table = pa.table({"text": ["x"] * SHARD_ROWS})
    publish_part(Folder(str(folder)), names[0], 0, table, {"rows": SHARD_ROWS, "source_rows": SHARD_ROWS})
    for number in range(1, SHARDS - 10):
        os.link(folder / names[0], folder / names[number]) if number % 60_000 else _copy(folder, names, number)


def _copy(folder: Path, names: dict[int, str], number: int) -> None:
    """A file takes at most 65,000 hard links."""
    (folder / names[number]).write_bytes((folder / names[0]).read_bytes())
    names[0] = names[number]


def test_actor_memory_is_flat_over_1_000_shards(cluster, tmp_path, minilm):
    """The memory of a worker with a real model does not grow with the shards it has seen: over the last tenth of 1,000
    shards it is at most 5 % above what it was after the first tenth."""
    (tmp_path / "in").mkdir()
    text = [f"a text of some length {i}, as corpora have them " * (i % 7 + 1) for i in range(10_000)]
    pq.write_table(pa.table({"text": text}), tmp_path / "in" / "a.parquet", row_group_size=500)
    config = configure(
        EmbedConfig,
        input=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        model=minilm,
        shard_rows=10,
        max_workers=1,
    )
    seen: list[tuple[int, int]] = []
    watch = threading.Thread(target=_watch, args=(tmp_path / "out", seen), daemon=True)
    watch.start()
    outcome = embed(config)
    watch.join(timeout=30)

    assert len(outcome.parts) == 1000
    early = max(mib for done, mib in seen if 100 <= done < 200)
    late = max(mib for done, mib in seen if done >= 900)
    print("MiB of the worker after 100-200 shards:", early, "and after 900-1000:", late)
    assert late <= early * 1.05


def _watch(output: Path, seen: list[tuple[int, int]]) -> None:
    """Note the number of parts and the resident MiB of the largest Ray Data actor, 4 times a second, until the manifest exists."""
    while not (output / "_manifest.parquet").exists():
        workers = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(_cmdline(p))]
        resident = [p.memory_info().rss >> 20 for p in workers if p.is_running()]
        if resident:
            seen.append((len(list(output.glob("part-*"))), max(resident)))
        time.sleep(0.25)


def _cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []

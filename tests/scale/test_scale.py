"""The figures that a billion rows stand on. Run by `make scale`: minutes, not seconds."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.cluster import ClusterOptions, connect, decide
from lib.corpus import PLAN_SCHEMA, CorpusOptions, read
from lib.ledger import missing, open_ledger
from lib.progress import Progress
from lib.sharded import run
from lib.storage import Folder

SHARDS, SHARD_ROWS, FILES = 200_000, 50, 100


@dataclass(frozen=True)
class Measured:
    """A verb that writes each row with the resident memory (MiB) of the worker that saw it."""

    columns: pa.Schema

    def prepare(self, shard):
        return {"rows": read(shard, ["text"], self.columns, {})}, {}

    def worker(self):
        def work(bundle):
            rows = bundle["rows"]
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
            held = pa.array([resident] * len(rows), pa.int32())
            who = pa.array([os.getpid()] * len(rows), pa.int64())
            return {"rows": rows.append_column("mib", held).append_column("pid", who)}

        return work

    def finish(self, shard, bundle):
        return bundle["rows"].select(["text", "mib", "pid"]), {"rows": len(bundle["rows"]), "source_rows": len(bundle["rows"])}


@pytest.fixture
def cluster():
    import ray

    os.environ["RAY_ADDRESS"] = "local"
    connect()
    yield
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_planning_and_resuming_200_000_shards(tmp_path):
    """Planning 200,000 shards, and resuming a run of which all but ten are done, stay under 2 GB and 2 minutes in the
    driver. The input is real (100 files, 10 million short rows), so is the listing of 199,990 parts; they are empty."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_scale; test_scale.drive(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = dict(line.split(" ", 1) for line in done.stdout.splitlines())

    assert int(figures["shards"]) == SHARDS
    assert int(figures["pending"]) == 10
    assert int(figures["parts"]) == SHARDS
    assert float(figures["seconds"]) < 120
    assert float(figures["peak_mib"]) < 2048


def drive(folder: str) -> None:
    """In a process of its own, so that its memory is its own."""
    root = Path(folder)
    (root / "in").mkdir()
    table = pa.table({"text": [f"t{i}" for i in range(SHARDS * SHARD_ROWS // FILES)]})
    for i in range(FILES):
        pq.write_table(table, root / "in" / f"{i:03d}.parquet", row_group_size=SHARD_ROWS * 20)
    options, out = CorpusOptions(input=str(root / "in")), Folder(str(root / "out"))
    out.probe()
    began = time.monotonic()
    ledger = open_ledger(out, {"verb": "measured"}, options, {}, False, lambda _: SHARD_ROWS, {})
    print("shards", ledger.plan["shard"][-1].as_py() + 1)
    planned = time.monotonic() - began
    print(f"planning_seconds {planned:.1f}")
    _pretend(ledger, root / "out")
    began = time.monotonic()
    ledger = open_ledger(out, {"verb": "measured"}, options, {}, False, lambda _: SHARD_ROWS, {})
    pending = missing(ledger)
    print("pending", len(pending))
    os.environ["RAY_ADDRESS"] = "local"
    connect()
    outcome = run(Measured(ledger.columns), ledger, decide(ClusterOptions(), 0), Progress(SHARDS), pending)
    print("parts", len(outcome.parts))
    print(f"resuming_seconds {time.monotonic() - began:.1f}")
    print(f"seconds {planned + time.monotonic() - began:.1f}")
    print(f"peak_mib {peak_mib():.0f}")
    assert ledger.plan.schema == PLAN_SCHEMA


def _pretend(ledger, folder: Path) -> None:
    """Parts of every shard but the last ten: one real part, under every name."""
    from lib.ledger import publish_part

    names = ledger.part_names()
    table = pa.table({"text": ["x"] * SHARD_ROWS})
    publish_part(Folder(str(folder)), names[0], 0, table, {"rows": SHARD_ROWS})
    for number in range(1, SHARDS - 10):
        os.link(folder / names[0], folder / names[number]) if number % 60_000 else _copy(folder, names, number)


def _copy(folder: Path, names: dict[int, str], number: int) -> None:
    """A file takes at most 65,000 hard links."""
    (folder / names[number]).write_bytes((folder / names[0]).read_bytes())
    names[0] = names[number]


def test_actor_memory_is_flat_over_1_000_shards(cluster, tmp_path):
    """A worker's resident memory does not grow with the shards it has seen: the last tenth of 1,000 shards is within
    5 % or 20 MiB of the second tenth."""
    (tmp_path / "in").mkdir()
    text = ["a text of some length, as corpora have them " * 5] * 500
    pq.write_table(pa.table({"text": text * 1000}), tmp_path / "in" / "a.parquet", row_group_size=500)
    out = Folder(str(tmp_path / "out"))
    out.probe()
    options = CorpusOptions(input=str(tmp_path / "in"))
    ledger = open_ledger(out, {"verb": "measured"}, options, {}, False, lambda _: 500, {})
    run(Measured(ledger.columns), ledger, decide(ClusterOptions(max_workers=1), 0), Progress(1000), missing(ledger))

    paths = sorted((tmp_path / "out").glob("part-*"), key=lambda path: path.stat().st_mtime_ns)
    seen = [pq.read_table(path).slice(0, 1).to_pylist()[0] for path in paths]
    assert len(seen) == 1000
    assert len({row["pid"] for row in seen}) == 1
    held = [row["mib"] for row in seen]
    early, late = max(held[100:200]), max(held[-100:])
    print("MiB at shard 100-200:", early, "and at 900-1000:", late)
    assert late <= max(early * 1.05, early + 20)

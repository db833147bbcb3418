"""Two drivers on one output, each with a slice of the shards. tests/chaos/slices.py has the other cases."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.storage.folder import Folder
from tests.real.head import Head
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
ROWS = 1200


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with Head(ROOT, cpus=4, labels="shoal/kind=small") as head:
        yield head


@pytest.fixture(scope="module")
def command(tmp_path_factory, head) -> list[str]:
    """An embed job of 24 shards, without its output."""
    folder = tmp_path_factory.mktemp("slices")
    (folder / "in").mkdir()
    table = pa.table({"id": range(ROWS), "text": [f"fish number {i} swims with many others" for i in range(ROWS)]})
    pq.write_table(table, folder / "in" / "a.parquet")
    model = build("bert", folder / "model", pooling="mean")
    line = [sys.executable, "jobs/embed_corpus.py", "--input", folder / "in", "--model", model, "--shard-rows", 50]
    return [str(word) for word in [*line, "--max-workers", 1]]


@pytest.fixture
def start(head, command, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts drivers of one output; drivers that still run at the end of the test are killed."""
    drivers: list[subprocess.Popen] = []
    environment = os.environ | {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}

    def one(*words: str) -> subprocess.Popen:
        line, pipe = [*command, "--output", str(tmp_path / "out"), *words], subprocess.PIPE
        drivers.append(
            subprocess.Popen(line, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        )
        return drivers[-1]

    yield one
    for driver in drivers:
        driver.kill()
        driver.communicate()


def output_of(driver: subprocess.Popen) -> str:
    return driver.communicate(timeout=240)[0]


def rows_in(output: Path) -> list[int]:
    parts = sorted(Folder(str(output)).list("part-"))
    return [i for part in parts for i in pq.read_table(output / part)["id"].to_pylist()]


def test_drivers_of_different_slices_share_a_run(start, tmp_path):
    """Two drivers with a slice each, started at once: both work, every row is there once, and the last writes the manifest."""
    drivers = [start("--slice", slice_) for slice_ in ("1/3", "2-3/3")]
    outputs = [output_of(driver) for driver in drivers]

    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert "8 of 8 shards to do in slice 1/3" in outputs[0]
    assert "16 of 16 shards to do in slice 2-3/3" in outputs[1]
    assert rows_in(tmp_path / "out") == list(range(ROWS))
    assert any("manifest written" in output for output in outputs)
    assert pq.read_table(tmp_path / "out" / "_manifest.parquet").num_rows == 24

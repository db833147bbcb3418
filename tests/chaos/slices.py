"""Several drivers on one output: each with a slice, of one slice only one works, a slice alone leaves the other shards.

python -m pytest -o addopts="-q" tests/chaos/slices.py
"""

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


def test_of_two_drivers_started_at_once_one_works(start, tmp_path):
    """Two drivers of one output, started at once: one does every row, the other names the holder of the run and exits with 1."""
    drivers = [start() for _ in range(2)]
    outputs = [output_of(driver) for driver in drivers]

    assert sorted(driver.returncode for driver in drivers) == [0, 1], outputs
    (refused,) = (output for driver, output in zip(drivers, outputs, strict=True) if driver.returncode == 1)
    (worked,) = (driver.pid for driver in drivers if driver.returncode == 0)
    assert f"is held by process {worked} on" in refused
    assert rows_in(tmp_path / "out") == list(range(ROWS))


def test_a_slice_alone_leaves_the_others(start, tmp_path):
    """A driver of one slice ends well with its shards done, says how many are missing, and writes no manifest; the whole
    command does the others."""
    alone = start("--slice", "2/2", "--worker-label", "shoal/kind=in(small,large)")
    output = output_of(alone)

    assert alone.returncode == 0, output
    assert "12 shards of other slices" in output
    assert not (tmp_path / "out" / "_manifest.parquet").exists()
    rest = start()
    assert "12 of 24 shards to do" in output_of(rest)
    assert rows_in(tmp_path / "out") == list(range(ROWS))


def test_a_label_that_no_node_has_is_refused(start):
    """A label that no node has is refused, and the labels of the nodes are named."""
    driver = start("--worker-label", "shoal/kind=huge")
    output = output_of(driver)

    assert driver.returncode == 1
    assert "no node has the labels shoal/kind=huge" in output
    assert "shoal/kind=small" in output

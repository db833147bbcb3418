"""Several drivers on one output: of one slice only one works, a slice alone leaves the other shards, an unknown label is refused.

    python -m pytest -o addopts="-q" tests/chaos/slices.py

tests/engine/test_slices.py has two drivers of different slices.
"""

from tests.engine import test_slices
from tests.engine.test_slices import ROWS, output_of, rows_in

head, command, start = test_slices.head, test_slices.command, test_slices.start  # fixtures


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

"""Workers that do whole shards and go from stage to stage: who serves, who is dismissed, and what befalls them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from crewed import Told, done, pids, workers

from lib.crew import stand_aside, together
from lib.errors import RunError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def crewed(cluster, tmp_path):
    """The shards of a stage, done here: their receipts."""
    return lambda verb, count, workers: done(tmp_path, verb, count, workers)


def gone(pid):
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_the_workers_of_a_stage_serve_the_next(crewed):
    """Within `together` no process starts anew for a stage like the last; after it, and without it, they end with it."""
    with together():
        first = pids(crewed(Told(seconds=0.1), 20, workers(2, 0.9)))
        again = pids(crewed(Told(seconds=0.1), 20, workers(2, 0.9)))
        fewer = pids(crewed(Told(), 1, workers(2, 0.9)))
        with together():
            inner = pids(crewed(Told(seconds=0.1), 20, workers(2, 0.9)))
    alone = pids(crewed(Told(), 1, workers(2, 0.9)))

    assert len(first) == 2
    assert first == again == inner
    assert fewer < first
    assert not alone & first
    assert all(map(gone, first | alone))


def test_a_stage_of_all_cores_takes_a_worker_whose_neighbours_idle(crewed):
    """Two workers of a core each have what one of two cores asks for; then both go on. Where their memory beside it would
    be too much they are dismissed for one of its own."""
    with together():
        first = pids(crewed(Told(seconds=0.1), 20, workers(2, 0.9)))
        whole = pids(crewed(Told(), 1, workers(1, 1.8, threads=2, memory=2**30)))
        after = pids(crewed(Told(seconds=0.1), 20, workers(2, 0.9)))
        large = pids(crewed(Told(), 1, workers(1, 1.8, threads=2, memory=2**50)))

        assert whole < first
        assert first == after
        assert not large & first
        assert all(map(gone, first))


def test_a_lent_worker_that_dies_is_replaced_by_one_of_its_own_cores(crewed, monkeypatch):
    """The neighbours, who hold them, go; else it would wait for ever."""
    monkeypatch.setattr("lib.crew.DEATHS", 1)
    with together():
        crewed(Told(seconds=0.1), 20, workers(2, 0.9))
        (receipt,) = crewed(Told(poison=(0,)), 1, workers(1, 1.8, threads=2))
        after = crewed(Told(), 4, workers(2, 0.9))

    assert receipt.failure.startswith("its process died each time (Ray's last error: ActorDiedError: ")
    assert len(after) == 4


def test_whoever_is_kept_stands_aside(crewed):
    """What needs the CPUs otherwise, as Ray Data, has them."""
    with together():
        first = pids(crewed(Told(seconds=0.1), 20, workers(2, 0.9)))
        stand_aside()
        assert all(map(gone, first))
        assert len(crewed(Told(), 3, workers(2, 0.9))) == 3


def test_one_poisonous_shard_costs_no_other(crewed):
    """It is tried again last, alone; the shards that waited behind it are done by others, each once."""
    receipts = crewed(Told(seconds=0.02, poison=(3,)), 30, workers(2, 0.9))

    assert [receipt.shard for receipt in receipts if receipt.failure] == [3]
    assert sorted(receipt.shard for receipt in receipts) == list(range(30))


def test_workers_that_cannot_start_end_the_run(crewed):
    """In their own words, within seconds."""
    began = time.monotonic()
    with pytest.raises(RunError, match=r"the workers could not run: .*the weights are damaged"):
        crewed(Told(loads=False), 500, workers(2, 0.9))
    assert time.monotonic() - began < 20


def test_who_gives_up_leaves_no_one_at_work(cluster, tmp_path):
    """Where the driver stops listening the shards that it gave out are not done on, in `together` either."""
    from crewed import shards

    from lib.crew import perform
    from lib.storage import Folder

    folder = Folder(str(tmp_path))
    folder.publish("_run.json", b"{}")
    with together():
        receipts = perform((Told(seconds=0.3), folder, dict.fromkeys(range(9), "part")), shards(9), workers(2, 0.9), 2)
        pid = next(receipts).counts["pid"]
        receipts.close()
        assert gone(pid)


def test_a_lost_node_costs_its_shards_nothing_but_time(tmp_path):
    """Of two nodes one is lost: its shards are done on the other, before any new node comes. Of a stage with one shard the worker
    on the other node is dismissed, so that an autoscaler may take it back."""
    line = [sys.executable, ROOT / "tests/crewed.py", tmp_path]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ran = subprocess.run(line, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])

    assert told["shards"] == list(range(40))
    assert told["pids"] == 2
    assert told["free"] == 1.0

"""Workers that do whole shards and go from stage to stage: who serves, who is dismissed, and what befalls them."""

import time
from functools import partial

import psutil
import pytest

from lib.engine import dispatch
from lib.engine.actor_pool import release_shared_pool, shared_pool
from lib.errors import RunError
from tests.support.crewed import begun, done, pids, told, workers

TWO, WHOLE = workers(2, 0.9), workers(1, 1.8, threads=2, memory=2**30)


@pytest.fixture
def stage(cluster, tmp_path):
    """The receipts of a stage that is done here."""
    return partial(done, tmp_path)


def gone(pid):
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_the_workers_of_a_stage_serve_the_next(stage):
    """Within `together` no process starts anew for a stage like the last; after it, and without it, they end with it."""
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        again = pids(stage(4, TWO, meet=2))
        fewer = pids(stage(1, TWO))
        with shared_pool():
            inner = pids(stage(4, TWO, meet=2))
    alone = pids(stage(1, TWO))

    assert len(first) == 2
    assert first == again == inner
    assert fewer < first
    assert not alone & first
    assert all(map(gone, first | alone))


def test_a_stage_of_all_cores_takes_a_worker_whose_neighbours_idle(stage):
    """Two workers of a core each have what one of two cores asks for; then both go on. Where its memory leaves none for them
    they are dismissed for one of its own."""
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        whole = pids(stage(1, WHOLE))
        after = pids(stage(4, TWO, meet=2))
        large = pids(stage(1, workers(1, 1.8, threads=2, memory=2**50)))

        assert whole < first
        assert first == after
        assert not large & first
        assert all(map(gone, first))


def test_a_lent_worker_that_dies_is_replaced_by_one_of_its_own_cores(stage, monkeypatch):
    """The neighbours, who hold them, go; else it would wait for ever."""
    monkeypatch.setattr(dispatch, "DEATHS", 1)
    with shared_pool():
        stage(4, TWO, meet=2)
        (receipt,) = stage(1, WHOLE, poison=(0,))
        after = stage(4, TWO)

    assert receipt.failure.startswith("its process died each time (Ray's last error: ActorDiedError: ")
    assert len(after) == 4


def test_whoever_is_kept_stands_aside(stage):
    """What needs the CPUs otherwise, as Ray Data, has them."""
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        release_shared_pool()
        assert all(map(gone, first))
        assert len(stage(3, TWO)) == 3


def test_whoever_idles_long_beside_the_last_makes_room(stage, monkeypatch):
    """Others may need its CPUs. Lent ones are in use."""
    monkeypatch.setattr(dispatch, "PATIENCE", 0.3)
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        stage(1, WHOLE, slow=1.5)
        assert all(map(psutil.pid_exists, first))
        one = pids(stage(1, TWO, slow=1.5))
        assert all(map(gone, first - one))


def test_no_shard_waits_behind_another_while_a_worker_is_free(stage):
    """The last shards go to one worker each: one of three that ends after the others finds them done."""
    receipts = {receipt.shard: receipt for receipt in stage(3, TWO, last=0)}

    assert not any(receipt.failure for receipt in receipts.values())
    assert receipts[0].counts["pid"] not in pids([receipts[1], receipts[2]])


def test_poisonous_shards_cost_no_other(stage, monkeypatch):
    """They are tried again last, alone; the shards that waited behind them are done by others, each once."""
    monkeypatch.setattr(dispatch, "DEATHS", 1)
    receipts = stage(20, TWO, poison=(3, 4, 19))

    assert sorted(receipt.shard for receipt in receipts if receipt.failure) == [3, 4, 19]
    assert sorted(receipt.shard for receipt in receipts) == list(range(20))


def test_what_no_step_catches_is_that_shards_failure(stage):
    """Its worker lives on, and the run goes on."""
    receipts = stage(12, workers(1, 0.9), odd=(2, 3, 4, 5, 6, 7))
    failed = {receipt.shard: receipt.failure for receipt in receipts if receipt.failure}

    assert failed == dict.fromkeys(range(2, 8), "Odd: seventeen")
    assert len(pids(receipt for receipt in receipts if not receipt.failure)) == 1


def test_workers_that_cannot_load_end_the_run(stage):
    """In their own words, within seconds."""
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"^the workers could not run: RuntimeError: ValueError: the weights are damaged"
    ):
        stage(500, TWO, unable=10**6)
    assert time.monotonic() - began < 30


def test_some_workers_that_cannot_load_are_replaced(stage):
    """Eight at once, as where a node is ill or the store hiccups, are one failure and not eight."""
    receipts = stage(30, workers(8, 0.2), unable=8)

    assert sorted(receipt.shard for receipt in receipts) == list(range(30))
    assert not any(receipt.failure for receipt in receipts)


def test_who_gives_up_leaves_no_one_at_work(cluster, tmp_path):
    """Where the driver stops listening, the shards that it gave out are not done on, in `together` either."""
    with shared_pool():
        receipts = begun(tmp_path, 9, TWO, seconds=0.3)
        pid = next(receipts).counts["pid"]
        receipts.close()
        assert gone(pid)


def test_a_lost_node_costs_shards_nothing_but_time(tmp_path):
    """The shards of one of two nodes are done on the other, before a new one comes (tests/scale/test_crew_nodes.py has more)."""
    found = told("two_nodes", tmp_path)

    assert sorted(found["done"]) == list(range(30))
    assert found["pids"] == 2

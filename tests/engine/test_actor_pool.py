"""The actor pool: which actors serve a stage, which are stopped, and what happens when they die."""

import time
from functools import partial

import psutil
import pytest

from lib.engine import dispatch
from lib.engine.actor_pool import release_shared_pool, shared_pool
from lib.errors import RunError
from tests.support.stages import finished, pids, started, workers

TWO, ALL_CPUS = workers(2, 0.9), workers(1, 1.8, cores=2.0, memory=2**30)


@pytest.fixture
def stage(cluster, tmp_path):
    """stage(shards, workers, **trace): the receipts of a finished stage."""
    return partial(finished, tmp_path)


def has_ended(pid):
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def test_the_actors_of_a_stage_serve_the_next(stage):
    """Inside a shared pool no process starts anew for a stage of the same shape; at its end, and without it, they end."""
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
    assert all(map(has_ended, first | alone))


def test_a_stage_of_all_cpus_borrows_an_actor_whose_neighbours_are_idle(stage):
    """Two idle actors of a CPU each have the two CPUs that one worker needs; then both go on. Where its memory leaves none for
    them, they are stopped and it gets an actor of its own."""
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        whole = pids(stage(1, ALL_CPUS))
        after = pids(stage(4, TWO, meet=2))
        large = pids(stage(1, workers(1, 1.8, cores=2.0, memory=2**50)))

        assert whole < first
        assert first == after
        assert not large & first
        assert all(map(has_ended, first))


def test_a_borrowed_actor_that_dies_is_replaced_by_one_with_cpus_of_its_own(stage, monkeypatch):
    """Its neighbours, which hold those CPUs, are stopped; else the new one would wait for ever."""
    monkeypatch.setattr(dispatch, "MAX_ACTOR_DEATHS", 1)
    with shared_pool():
        stage(4, TWO, meet=2)
        (receipt,) = stage(1, ALL_CPUS, poison=(0,))
        after = stage(4, TWO)

    assert receipt.failure.startswith("its process died each time (Ray's last error: ActorDiedError: ")
    assert len(after) == 4


def test_a_released_pool_frees_its_cpus(stage):
    """Another executor, as Ray Data, gets them."""
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        release_shared_pool()
        assert all(map(has_ended, first))
        assert len(stage(3, TWO)) == 3


def test_actors_idle_beside_the_last_shards_are_stopped(stage, monkeypatch):
    """Others may need their CPUs. Those that a borrowed actor uses stay."""
    monkeypatch.setattr(dispatch, "IDLE_SECONDS", 0.3)
    with shared_pool():
        first = pids(stage(4, TWO, meet=2))
        stage(1, ALL_CPUS, slow=1.5)
        assert all(map(psutil.pid_exists, first))
        one = pids(stage(1, TWO, slow=1.5))
        assert all(map(has_ended, first - one))


def test_no_shard_waits_behind_another_while_an_actor_is_free(stage):
    """The last shards go to one actor each: of three, one that ends last finds the others done."""
    receipts = {receipt.shard: receipt for receipt in stage(3, TWO, last=0)}

    assert not any(receipt.failure for receipt in receipts.values())
    assert receipts[0].counts["pid"] not in pids([receipts[1], receipts[2]])


def test_poison_shards_cost_no_other(stage, monkeypatch):
    """They are tried again last, alone; the shards that waited behind them are done by others, each once."""
    monkeypatch.setattr(dispatch, "MAX_ACTOR_DEATHS", 1)
    receipts = stage(20, TWO, poison=(3, 4, 19))

    assert sorted(receipt.shard for receipt in receipts if receipt.failure) == [3, 4, 19]
    assert sorted(receipt.shard for receipt in receipts) == list(range(20))


def test_an_uncaught_exception_fails_its_shard_alone(stage):
    """Its actor lives on, and the run goes on."""
    receipts = stage(12, workers(1, 0.9), odd=(2, 3, 4, 5, 6, 7))
    failed = {receipt.shard: receipt.failure for receipt in receipts if receipt.failure}

    assert failed == dict.fromkeys(range(2, 8), "Odd: seventeen")
    assert len(pids(receipt for receipt in receipts if not receipt.failure)) == 1


def test_actors_that_cannot_load_end_the_run(stage):
    """With their own error, within seconds."""
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"^the workers could not run: RuntimeError: ValueError: the weights are damaged"
    ):
        stage(500, TWO, unable=10**6)
    assert time.monotonic() - began < 30


def test_some_actors_that_cannot_load_are_replaced(stage):
    """Eight at once, as where a node is ill or the store hiccups, are one failure and not eight."""
    receipts = stage(30, workers(8, 0.2), unable=8)

    assert sorted(receipt.shard for receipt in receipts) == list(range(30))
    assert not any(receipt.failure for receipt in receipts)


def test_a_driver_that_stops_leaves_no_actor_busy(cluster, tmp_path):
    """Where the driver stops reading receipts, the shards in flight are not finished, in a shared pool either."""
    with shared_pool():
        receipts = started(tmp_path, 9, TWO, seconds=0.3)
        pid = next(receipts).counts["pid"]
        receipts.close()
        assert has_ended(pid)

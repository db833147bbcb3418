"""The lease of a run: one driver at a time, and after a dead one another."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given as every
from hypothesis import strategies as some

from lib.engine import lease
from lib.engine.lease import ALL, HOLDERS, ShardSlice, hold_lease, parse_slice
from lib.errors import RunError, UsageError
from lib.storage.folder import Folder
from tests.support.messages import listen

ELSEWHERE = {"host": "far", "processes": "of another machine", "pid": 7, "key": "its own", "beat": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A beat every 0.05 s, dead after half a second."""
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "DEAD", 0.5)
    monkeypatch.setattr(lease, "LOOK", 0.02)


@pytest.fixture
def run(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    folder.probe()
    return folder


def leave(run: Folder, words: dict, name: str = "1-1-of-1-0000.json") -> None:
    """Write the object that a killed driver leaves."""
    run.below(HOLDERS).publish(name, json.dumps(words).encode())


def slices():
    return some.integers(1, 12).flatmap(
        lambda of: some.tuples(some.integers(1, of), some.integers(1, of)).map(
            lambda ends: ShardSlice(*sorted(ends), of)
        )
    )


@pytest.mark.parametrize(
    ("text", "expected"), [(None, ALL), ("2/4", ShardSlice(2, 2, 4)), ("1-3/4", ShardSlice(1, 3, 4)), ("1/1", ALL)]
)
def test_slices_are_read(text, expected):
    """I/N and I-J/N name slices; without one, a driver does the whole run."""
    assert parse_slice(text) == expected


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "3-2/4", "1/0", "a/b", "1-/4", "1/2/3"])
def test_other_texts_than_slices_are_refused(text):
    """A text that names no slice is refused with the two forms."""
    with pytest.raises(UsageError, match="I/N or I-J/N"):
        parse_slice(text)


@every(some.integers(1, 30), some.integers(0, 1000))
def test_each_shard_is_in_one_slice(of, shard):
    """The N slices 1/N to N/N have every shard once."""
    assert sum(ShardSlice(n, n, of).has(shard) for n in range(1, of + 1)) == 1


@every(slices(), slices())
def test_slices_meet_where_they_have_a_shard_in_common(one, other):
    """Two slices, of whatever N, meet exactly when some shard is in both."""
    common = any(one.has(shard) and other.has(shard) for shard in range(one.of * other.of))

    assert one.meets(other) == common


def test_a_second_driver_is_refused(run):
    """While a driver lives, another of the same run, or of a slice of it, is refused; the error names the holder's process."""
    with hold_lease(run, ALL) as check_lease:
        for shard_slice in (ALL, ShardSlice(2, 2, 4)):
            began = time.monotonic()
            with pytest.raises(RunError, match=r"held by process \d+ on"), hold_lease(run, shard_slice):
                pass
            assert time.monotonic() - began < lease.DEAD
        check_lease()

    with hold_lease(run, ALL):  # free again at once
        pass
    assert run.below(HOLDERS).list() == {}


def test_drivers_of_different_slices_run_together(run):
    """Drivers of different slices do not hinder each other; one of a slice that another has a part of is refused."""
    with hold_lease(run, ShardSlice(1, 2, 4)), hold_lease(run, ShardSlice(4, 4, 4)):
        with pytest.raises(RunError, match="slice 1-2/4"), hold_lease(run, ShardSlice(2, 3, 4)):
            pass
        with hold_lease(run, ShardSlice(3, 3, 4)):
            pass


def test_a_dead_driver_of_another_machine_is_replaced_after_a_wait(run):
    """A lease without a beat for DEAD seconds is taken over; a message names the process that is waited for."""
    leave(run, ELSEWHERE)
    messages = listen()
    began = time.monotonic()
    with hold_lease(run, ALL):
        assert time.monotonic() - began >= lease.DEAD
        assert list(run.below(HOLDERS).list()) == ["1-1-of-1-0001.json"]

    assert "process 7 on far" in messages[0]


def test_a_dead_process_of_this_machine_is_replaced_at_once(run):
    """Without a wait: the process of the holder is known to be gone."""
    no_process = 2**22 + 1  # Linux counts to 2**22
    leave(run, {"host": "here", "processes": lease._processes(), "pid": no_process, "key": "its own", "beat": 0})
    messages = listen()
    began = time.monotonic()
    with hold_lease(run, ALL):
        assert time.monotonic() - began < lease.DEAD

    assert messages == []


@pytest.mark.parametrize("generation", [0, 1], ids=["at a beat", "at its claim"])
def test_half_a_file_of_a_dead_driver_is_removed(run, generation):
    """A driver that is killed while it writes its object leaves half of it beside the name; the next driver removes it."""
    leave(run, {"host": "here", "processes": lease._processes(), "pid": 2**22 + 1, "key": "its own", "beat": 0})
    half = Path(run.below(HOLDERS).url) / f".1-1-of-1-{generation:04d}.json.{'0' * 32}.unfinished"
    half.write_bytes(b"{")
    with hold_lease(run, ALL):
        assert not half.exists()


def test_a_replaced_holder_stops(run, monkeypatch):
    """A driver that could not beat for DEAD seconds, and was replaced, stops as soon as it can beat again."""
    real, may_go_on = Folder.read, threading.Event()
    with hold_lease(run, ALL) as check_lease:
        (beating,) = (thread for thread in threading.enumerate() if thread.name == "lease")

        def hangs_for_one(folder, name):
            if threading.current_thread() is beating:
                may_go_on.wait(30)
            return real(folder, name)

        monkeypatch.setattr(Folder, "read", hangs_for_one)
        time.sleep(4 * lease.BEAT)
        with hold_lease(run, ALL):
            check_lease()  # it cannot know yet
            may_go_on.set()
            time.sleep(6 * lease.BEAT)
            with pytest.raises(RunError, match="another driver has taken over"):
                check_lease()


@pytest.mark.parametrize("server", ["ceph"], indirect=True)
def test_one_of_many_drivers_takes_over(bucket, monkeypatch):
    """Four drivers find a dead one's lease at once: one gets it, the others are refused."""
    monkeypatch.setattr(lease, "DEAD", 5.0)  # the server takes its time with four on two cores
    monkeypatch.setattr(lease, "LOOK", 0.5)
    run = Folder(f"{bucket}/run")
    leave(run, ELSEWHERE)
    ready, over = threading.Barrier(4), threading.Event()

    def driver(number: int) -> bool:
        ready.wait(30)
        try:
            with hold_lease(run, ALL):
                return over.wait(10)
        except RunError as error:
            return "held by process" not in str(error)

    with ThreadPoolExecutor(4) as threads:
        tries = [threads.submit(driver, n) for n in range(4)]
        while sum(one.done() for one in tries) < 3:
            time.sleep(0.05)
        over.set()

    assert sum(one.result() for one in tries) == 1

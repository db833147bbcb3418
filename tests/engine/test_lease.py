"""Who works on a run: one driver at a time, and after a dead one another."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
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
    """What a driver leaves that was killed."""
    run.below(HOLDERS).publish(name, json.dumps(words).encode())


def quiet(sentence: str) -> None:
    pass


def shares():
    return some.integers(1, 12).flatmap(
        lambda of: some.tuples(some.integers(1, of), some.integers(1, of)).map(
            lambda ends: ShardSlice(*sorted(ends), of)
        )
    )


@pytest.mark.parametrize(
    ("text", "share"), [(None, ALL), ("2/4", ShardSlice(2, 2, 4)), ("1-3/4", ShardSlice(1, 3, 4)), ("1/1", ALL)]
)
def test_slices_are_read(text, share):
    """I/N and I-J/N name slices; without any, a driver does the whole."""
    assert parse_slice(text) == share


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "3-2/4", "1/0", "a/b", "1-/4", "1/2/3"])
def test_slices_that_are_none_are_refused(text):
    """What is no slice is refused with the two forms."""
    with pytest.raises(UsageError, match="I/N or I-J/N"):
        parse_slice(text)


@given(some.integers(1, 30), some.integers(0, 1000))
def test_each_shard_is_in_one_slice(of, shard):
    """The N slices 1/N to N/N have every shard once."""
    assert sum(ShardSlice(n, n, of).has(shard) for n in range(1, of + 1)) == 1


@given(shares(), shares())
def test_slices_meet_where_they_have_a_shard_in_common(one, other):
    """Two slices, of whatever N, meet exactly when some shard is in both."""
    common = any(one.has(shard) and other.has(shard) for shard in range(one.of * other.of))

    assert one.meets(other) == common


def test_a_second_driver_is_told_who_is_at_work(run):
    """While a driver lives, another of the same run, or of a slice of it, is refused and told the holder's process."""
    with hold_lease(run, ALL, quiet) as still_held:
        for share in (ALL, ShardSlice(2, 2, 4)):
            began = time.monotonic()
            with pytest.raises(RunError, match=r"held by process \d+ on"), hold_lease(run, share, quiet):
                pass
            assert time.monotonic() - began < lease.DEAD
        still_held()

    with hold_lease(run, ALL, quiet):  # free again at once
        pass
    assert run.below(HOLDERS).list() == {}


def test_slices_are_held_beside_each_other(run):
    """Drivers of different slices do not hinder each other; one of a slice that another has a part of is refused."""
    with hold_lease(run, ShardSlice(1, 2, 4), quiet), hold_lease(run, ShardSlice(4, 4, 4), quiet):
        with pytest.raises(RunError, match="slice 1-2/4"), hold_lease(run, ShardSlice(2, 3, 4), quiet):
            pass
        with hold_lease(run, ShardSlice(3, 3, 4), quiet):
            pass


def test_a_dead_driver_of_another_machine_is_waited_for_and_replaced(run):
    """A holder that gives no sign for DEAD seconds is taken over, and whoever waits is told for whom."""
    leave(run, ELSEWHERE)
    said = listen()
    began = time.monotonic()
    with hold_lease(run, ALL):
        assert time.monotonic() - began >= lease.DEAD
        assert list(run.below(HOLDERS).list()) == ["1-1-of-1-0001.json"]

    assert "process 7 on far" in said[0]


def test_a_dead_process_of_this_machine_is_replaced_at_once(run):
    """Where the holder ran on this machine and its process is gone, nobody waits."""
    no_process = 2**22 + 1  # Linux counts to 2**22
    leave(run, {"host": "here", "processes": lease._processes(), "pid": no_process, "key": "its own", "beat": 0})
    said = listen()
    began = time.monotonic()
    with hold_lease(run, ALL):
        assert time.monotonic() - began < lease.DEAD

    assert said == []


@pytest.mark.parametrize("generation", [0, 1], ids=["at a beat", "at its claim"])
def test_what_a_dead_driver_was_writing_goes_with_it(run, generation):
    """A driver that is killed while it writes its object leaves half of it beside the name; the next one clears it away."""
    leave(run, {"host": "here", "processes": lease._processes(), "pid": 2**22 + 1, "key": "its own", "beat": 0})
    half = Path(run.below(HOLDERS).url) / f".1-1-of-1-{generation:04d}.json.{'0' * 32}.unfinished"
    half.write_bytes(b"{")
    with hold_lease(run, ALL, quiet):
        assert not half.exists()


def test_a_holder_that_was_given_up_learns_it(run, monkeypatch):
    """A driver that could not beat for DEAD seconds, and was replaced, stops once it can again."""
    real, thawed = Folder.read, threading.Event()
    with hold_lease(run, ALL, quiet) as still_held:
        (beating,) = (thread for thread in threading.enumerate() if thread.name == "lease")

        def hangs_for_one(folder, name):
            if threading.current_thread() is beating:
                thawed.wait(30)
            return real(folder, name)

        monkeypatch.setattr(Folder, "read", hangs_for_one)
        time.sleep(4 * lease.BEAT)
        with hold_lease(run, ALL, quiet):
            still_held()  # it cannot know yet
            thawed.set()
            time.sleep(6 * lease.BEAT)
            with pytest.raises(RunError, match="another driver has taken over"):
                still_held()


@pytest.mark.parametrize("server", ["ceph"], indirect=True)
def test_of_many_that_find_a_dead_driver_one_takes_over(bucket, monkeypatch):
    """Eight drivers that find a dead one's lease at once: one gets it, the others are told of it."""
    monkeypatch.setattr(lease, "DEAD", 6.0)  # the server takes its time with eight on two cores
    run = Folder(f"{bucket}/run")
    leave(run, ELSEWHERE)
    gathered, over = threading.Barrier(8), threading.Event()

    def driver(number: int) -> bool:
        gathered.wait(30)
        try:
            with hold_lease(run, ALL, quiet):
                return over.wait(10)
        except RunError as error:
            return "held by process" not in str(error)

    with ThreadPoolExecutor(8) as threads:
        tries = [threads.submit(driver, n) for n in range(8)]
        while sum(one.done() for one in tries) < 7:
            time.sleep(0.05)
        over.set()

    assert sum(one.result() for one in tries) == 1

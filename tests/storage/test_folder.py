"""The storage contract, on the local disk, on Ceph and on Swift."""

import hashlib
import multiprocessing
import os
import random
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import pytest

from lib.errors import StorageError
from lib.storage.folder import Folder
from lib.storage.listing import find
from tests.conftest import same

MB = 1 << 20
SIZE = 30 * MB  # of an object whose writer is killed

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__, "s3fs", "aiobotocore.session"])  # a process starts in 0.1 s in place of 2


def test_published_objects_are_listed_with_their_sizes(store):
    """`list` gives the bare names in the folder, filtered by prefix, with sizes in bytes; deeper and hidden names are not in it."""
    folder = Folder(store)
    assert folder.list() == {}
    for name, size in (("part-0", 0), ("part-1", 1000), ("_run.json", 7), (".hidden", 1)):
        folder.publish(name, b"x" * size)
    Folder(f"{store}/deeper").publish("part-2", b"x")

    assert folder.list() == {"part-0": 0, "part-1": 1000, "_run.json": 7}
    assert folder.list("part-") == {"part-0": 0, "part-1": 1000}


def test_publish_overwrites(store):
    """The last publish is what is read, whether it is longer or shorter than the one before."""
    folder = Folder(store)
    for data in (b"first", b"the second is longer", b"3rd", b""):
        folder.publish("name", data)

        assert folder.read("name") == data
        assert folder.list() == {"name": len(data)}


def test_a_listing_has_no_page_border(store):
    """S3 answers 1,000 names at a time; `list` and `find` give all of them."""
    folder = Folder(store)
    folder.publish("0000", b"x")  # makes the local folder before the threads do
    names = [f"{number:04}" for number in range(1003)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: folder.publish(name, b"x"), names))

    assert folder.list() == dict.fromkeys(names, 1)
    assert [file.path.rsplit("/", 1)[-1] for file in find(store, {})] == names


def test_a_missing_name_is_not_an_error_of_the_store(store):
    """A missing name is a FileNotFoundError, for the caller to judge, and no StorageError."""
    folder = Folder(store)
    folder.publish("other", b"x")
    for ask in (folder.read, folder.open):
        with pytest.raises(FileNotFoundError):
            ask("name")


def test_ranges_equal_slices(store):
    """A read by `open` at any offset and length equals the slice of the object: footers and row groups are read like this."""
    data = random.Random(0).randbytes(20 * MB)
    Folder(store).publish("name", data)
    draw = random.Random(1)
    with Folder(store).open("name") as file:
        for _ in range(40):
            start, size = draw.randrange(len(data)), draw.choice((1, 8, 1000, MB, 9 * MB))
            file.seek(start)
            assert same(file.read(size), data[start : start + size])
        file.seek(-8, os.SEEK_END)
        assert file.read() == data[-8:]
        file.seek(0)
        assert same(file.read(), data)


def test_claim_creates_once(store):
    """The first claim wins: a later one with other bytes is refused, the same bytes again are accepted (a retry's lost answer)."""
    folder = Folder(store)

    assert folder.claim("name", b"mine")
    assert not folder.claim("name", b"theirs")
    assert folder.claim("name", b"mine")
    assert folder.read("name") == b"mine"
    assert folder.list() == {"name": 4}


def start_racer(environment, barrier):
    os.environ.update(environment)
    globals()["barrier"] = barrier


def race(url: str, racer: int, keys: int) -> list[bool]:
    won = []
    for key in range(keys):
        globals()["barrier"].wait(60)
        won.append(Folder(url).claim(f"key-{key}", b"racer %d" % racer))
    return won


def test_of_racing_claims_one_wins(store):
    """4 processes claim each of 20 names at once: one wins, and its bytes are stored. Swift, which creates without a lock, may
    let several win; the stored bytes are those of one of them."""
    racers, keys = 4, 20
    barrier = processes.Barrier(racers)
    with ProcessPoolExecutor(racers, processes, start_racer, (dict(os.environ), barrier)) as pool:
        won = list(pool.map(race, [store] * racers, range(racers), [keys] * racers))
    winners = [[racer for racer in range(racers) if won[racer][key]] for key in range(keys)]
    stored = [int(Folder(store).read(f"key-{key}").split()[1]) for key in range(keys)]

    assert all(racer in winners[key] for key, racer in enumerate(stored))
    if not is_swift(store):
        assert winners == [[racer] for racer in stored]


def is_swift(store: str) -> bool:
    return store.startswith("s3:") and os.environ["AWS_ACCESS_KEY_ID"] == "test:test"


def publish_for_ever(environment, url, options, name, publishing):
    os.environ.update(environment)
    folder = Folder(url, options)
    for number in range(10_000):
        data = bytes([number % 256]) * SIZE
        publishing.value = 1
        folder.publish(name, data)
        publishing.value = 0


def kill_while_publishing(store: str, options: dict) -> bool:
    """Watch the listing while a process publishes, SIGKILL it, watch on; true when it died during a publish."""
    publishing = processes.Value("b", 0, lock=False)
    arguments = (dict(os.environ), store, options, "name", publishing)
    writer = processes.Process(target=publish_for_ever, args=arguments, daemon=True)
    writer.start()
    while not publishing.value:
        time.sleep(0.001)
    end = time.monotonic() + random.uniform(0.0, 0.8)
    while time.monotonic() < end:
        assert Folder(store).list() in ({}, {"name": SIZE})
    during_publish = bool(publishing.value)
    writer.kill()
    writer.join()

    assert Folder(store).list() in ({}, {"name": SIZE})
    return during_publish


@pytest.mark.parametrize("options", [{}, {"default_block_size": 5 * MB}], ids=["in one request", "in several"])
def test_a_killed_writer_leaves_a_complete_object_or_none(store, options):
    """However often a writer is killed while it publishes, its object is absent or complete, never a part and never a mixture."""
    deaths = 0
    for _ in range(20):
        deaths += kill_while_publishing(store, options)
        if Folder(store).list():
            data = Folder(store).read("name")
            assert same(data, data[:1] * SIZE)
        if deaths == 3:
            break
    else:
        pytest.fail(f"only {deaths} of 20 kills fell into a publish: nothing was tested")
    Folder(store).publish("name", b"after")
    assert Folder(store).list() == {"name": 5}


def test_a_file_is_put_whole(store, tmp_path):
    """`put` publishes a local file over an existing object, and returns its sha256; the file's own name may be removed."""
    (tmp_path / "source").write_bytes(data := random.Random(4).randbytes(3 * MB))
    folder = Folder(store)
    folder.publish("name", b"before")
    digest = folder.put("name", str(tmp_path / "source"))
    (tmp_path / "source").unlink()

    assert digest == hashlib.sha256(data).hexdigest()
    assert same(folder.read("name"), data)
    assert folder.list() == {"name": 3 * MB}


def test_a_file_is_copied_between_disks_alone(tmp_path):
    """On one disk `put` copies nothing; from another it copies; neither leaves anything unfinished."""
    disks = [disk for disk in ("/dev/shm", "/var/tmp") if os.path.isdir(disk)]
    others = [disk for disk in disks if os.stat(disk).st_dev != os.stat(tmp_path).st_dev]
    if not others:
        pytest.skip("needs a second disk")
    folder = Folder(str(tmp_path / "store"))
    with tempfile.TemporaryDirectory(dir=others[0]) as other:
        for name, place in (("near", str(tmp_path)), ("far", other)):
            with open(f"{place}/{name}", "wb") as file:
                file.write(name.encode())
            folder.put(name, f"{place}/{name}")
            shares = os.path.samefile(f"{place}/{name}", tmp_path / "store" / name)
            assert shares == (name == "near")

    assert sorted(os.listdir(tmp_path / "store")) == ["far", "near"]
    assert folder.read("far") == b"far"


@pytest.mark.parametrize("step", ["publish", "put", "claim"])
def test_a_writer_whose_unfinished_file_is_swept_goes_on(tmp_path, monkeypatch, step):
    """Another driver that has published the same name sweeps it: `put` writes once more, `claim` leaves the other's bytes."""
    folder, source = Folder(str(tmp_path / "store")), tmp_path / "source"
    source.write_bytes(b"mine")
    folder.publish("name", b"theirs")
    swept = []

    def after_a_sweep(real, start, end, **more):
        if str(start).endswith(".unfinished") and not swept:
            swept.append(start)
            folder.sweep(done={"name"})
        return real(start, end, **more)

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, partial(after_a_sweep, getattr(os, name)))
    argument = {"publish": b"mine", "put": str(source), "claim": b"mine"}[step]
    claimed = getattr(folder, step)("name", argument)

    assert swept
    assert folder.read("name") == (b"theirs" if step == "claim" else b"mine")
    assert step != "claim" or not claimed
    assert os.listdir(tmp_path / "store") == ["name"]


def test_a_sweep_takes_old_unfinished_files_only(tmp_path):
    """An unfinished file is removed once it is too old to have a writer, or once its name is published; a young one may be
    another driver's."""
    folder = Folder(str(tmp_path))
    folder.publish("name", b"whole")
    ages = {".old.1.unfinished": 3600, ".young.2.unfinished": 5, ".name.3.unfinished": 5, ".nameless.4.unfinished": 5}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"part")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    folder.sweep(done=folder.list())

    assert sorted(os.listdir(tmp_path)) == [".nameless.4.unfinished", ".young.2.unfinished", "name"]


def test_listing_while_others_publish(store):
    """A listing while others write and overwrite misses no earlier name, and shows no unfinished one."""
    folder = Folder(store)
    before = {f"before-{n}": 1 for n in range(5)}
    for name in before:
        folder.publish(name, b"x")
    done = threading.Event()

    def write(writer: int) -> None:
        while not done.is_set():
            folder.publish(f"during-{writer}", b"x")

    with ThreadPoolExecutor(4) as threads:
        writers = [threads.submit(write, writer) for writer in range(4)]
        try:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                assert folder.list() | {f"during-{n}": 1 for n in range(4)} == before | {
                    f"during-{n}": 1 for n in range(4)
                }
                assert folder.list("before") == before
        finally:
            done.set()
        for writer in writers:
            writer.result()


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """On a full disk `publish` is a StorageError that says so; no part of the object stays, and earlier objects are unchanged."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], check=True)
    try:
        folder = Folder(str(tmp_path))
        folder.publish("old", b"x" * 4 * MB)
        for act in (folder.publish, folder.claim):
            with pytest.raises(StorageError, match=f"{tmp_path}/new: the disk is full. Free space"):
                act("new", b"x" * 6 * MB)
        with pytest.raises(StorageError, match="the disk is full"):
            folder.publish("old", b"y" * 6 * MB)

        assert os.listdir(tmp_path) == ["old"]
        assert same(folder.read("old"), b"x" * 4 * MB)
        os.unlink(tmp_path / "old")
        folder.publish("new", b"x" * 6 * MB)
        assert folder.list() == {"new": 6 * MB}
    finally:
        subprocess.run(["umount", tmp_path], check=True)

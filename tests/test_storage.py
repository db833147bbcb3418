"""The storage contract, held on the local disk, on Ceph and on Swift, and before them a proxy that misbehaves."""

import multiprocessing
import os
import random
import subprocess
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from conftest import use
from real.proxy import FaultProxy

from lib.errors import StorageError
from lib.listing import covers, current_tag, find
from lib.storage import Folder

MB = 1 << 20
TELL = 10.0  # seconds within which a person at the terminal is told what is wrong

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lib.storage", "s3fs"])


def same(got: bytes, expected: bytes) -> bool:
    """As `==`, without pytest's letter by letter comparison of megabytes."""
    return got == expected


@contextmanager
def misbehaving(server, monkeypatch, **faults):
    """A proxy before `server`, with the environment leading to it."""
    with FaultProxy("127.0.0.1", server.ports["s3"]) as proxy:
        use({"AWS_ENDPOINT_URL": proxy.endpoint}, monkeypatch)
        for name, value in faults.items():
            setattr(proxy, name, value)
        yield proxy


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


def test_missing_names_are_told_apart(store):
    """A name that is not there is FileNotFoundError, for the caller to judge; it is not an error of the store."""
    folder = Folder(store)
    folder.publish("other", b"x")
    for ask in (folder.read, folder.open):
        with pytest.raises(FileNotFoundError):
            ask("name")


def test_ranges_equal_slices(store):
    """What `open` gives at any offset and length equals the slice of the object: footers and row groups are read so."""
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
    """The first claim holds: a later one with other bytes is refused, the same bytes again are granted (a retry's lost answer)."""
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
    """8 processes claim each of 20 names at once: one wins, and its bytes are there. Swift, which creates without a lock, may
    grant several, but what is there are the bytes of one that was granted."""
    racers, keys = 8, 20
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


def publish_for_ever(environment, url, name, size, publishing):
    os.environ.update(environment)
    for number in range(10_000):
        data = bytes([number % 256]) * size
        publishing.value = 1
        Folder(url).publish(name, data)
        publishing.value = 0


def kill_while_publishing(store: str, size: int) -> bool:
    """Watch the listing while a process publishes, SIGKILL it, watch on; true when it died in the midst."""
    publishing = processes.Value("b", 0, lock=False)
    writer = processes.Process(
        target=publish_for_ever, args=(dict(os.environ), store, "name", size, publishing), daemon=True
    )
    writer.start()
    while not publishing.value:
        time.sleep(0.001)
    end = time.monotonic() + random.uniform(0.0, 0.8)
    while time.monotonic() < end:
        assert Folder(store).list() in ({}, {"name": size})
    midst = bool(publishing.value)
    writer.kill()
    writer.join()

    assert Folder(store).list() in ({}, {"name": size})
    return midst


@pytest.mark.parametrize("size", [50 * MB, 110 * MB], ids=["in one request", "in several"])
def test_a_killed_writer_leaves_a_whole_object_or_none(store, size):
    """However often a writer is killed while it publishes: its name is absent or whole, never part of it, never a mixture."""
    deaths = 0
    for _ in range(20):
        deaths += kill_while_publishing(store, size)
        if Folder(store).list():
            data = Folder(store).read("name")
            assert same(data, data[:1] * size)
        if deaths == 4:
            break
    else:
        pytest.fail(f"only {deaths} of 20 kills fell into a publish: nothing was shown")
    Folder(store).publish("name", b"after")
    assert Folder(store).list() == {"name": 5}


def test_a_sweep_takes_old_unfinished_files_only(tmp_path):
    """What killed writers left goes once nobody can still be writing it, or once its name is published; another young
    file may be another driver's."""
    folder = Folder(str(tmp_path))
    folder.publish("name", b"whole")
    ages = {".old.1.unfinished": 3600, ".young.2.unfinished": 5, ".name.3.unfinished": 5, ".nameless.4.unfinished": 5}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"part")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    folder.sweep(done=folder.list())

    assert sorted(os.listdir(tmp_path)) == [".nameless.4.unfinished", ".young.2.unfinished", "name"]


def test_listing_while_others_publish(store):
    """A listing taken while others write and overwrite misses no name that was there before, and shows none unfinished."""
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


def test_find_gives_files_in_order_without_hidden_ones(store):
    """A folder, a glob and a file are found, sorted by path; names of which a part starts with `_` or `.` are no input."""
    for path in ("b.txt", "a/c.txt", "a/_d.txt", "_e/f.txt", "a/.g.txt"):
        folder, _, name = f"{store}/{path}".rpartition("/")
        Folder(folder).publish(name, b"xyz")

    def found(url: str) -> list[str]:
        return [file.path.split("/store/")[1] for file in find(url, {})]

    assert found(store) == ["a/c.txt", "b.txt"]
    assert found(f"{store}/*/*.txt") == ["a/c.txt"]
    assert found(f"{store}/b.txt") == ["b.txt"]
    assert found(f"{store}/none") == []
    assert {file.size for file in find(store, {})} == {3}


def test_links_are_followed(tmp_path):
    """Links to files and to folders are part of a corpus, once each; one that leads nowhere is an error."""
    (tmp_path / "store").mkdir()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "a.txt").write_text("a")
    os.symlink(tmp_path / "store" / "a.txt", tmp_path / "in" / "linked.txt")
    os.symlink(tmp_path / "store", tmp_path / "in" / "folder")
    os.symlink(tmp_path / "in", tmp_path / "in" / "deep" / "above")

    for url in (tmp_path / "in", f"{tmp_path}/in/**"):
        assert [file.name for file in find(str(url), {})] == ["folder/a.txt", "linked.txt"]
    (file, _) = find(str(tmp_path / "in"), {})
    assert current_tag(file.path, {}) == (file.size, file.tag)
    os.symlink("/nowhere", tmp_path / "in" / "broken.txt")
    with pytest.raises(StorageError, match=r"broken\.txt is a link to nothing"):
        find(str(tmp_path / "in"), {})


@pytest.mark.parametrize("pattern", ["", "/*/*.txt", "/**/*.txt", "/folder-1*/name-?.txt"])
def test_a_listing_under_errors_leaves_nothing_out(server, bucket, pattern, monkeypatch):
    """With 30 % of the requests answered 503, a folder or a glob gives the files that it gives without."""
    for number in range(30):
        Folder(f"{bucket}/in/folder-{number:02}").publish(f"name-{number % 3}.txt", b"x")
    expected = find(f"{bucket}/in{pattern}", {})
    assert len(expected) == (10 if "folder-1" in pattern else 30)

    with misbehaving(server, monkeypatch, error_rate=0.3) as proxy:
        for _ in range(10):
            assert find(f"{bucket}/in{pattern}", {}) == expected
        assert proxy.errors > 3


def test_what_an_input_covers(tmp_path):
    """A place under the input's folder, or that its glob would find, is covered; hidden places are not."""
    for url, place, covered in (
        ("data", "data/out", True),
        ("data", "data", True),
        ("data", "data-out", False),
        ("data", "data/_out", False),
        ("data/**/*.parquet", "data/out", True),
        ("data/*.parquet", "data/out", False),
        ("data/*", "data/out", True),
        ("data/**/*.jsonl", "data/out", False),
    ):
        assert covers(f"{tmp_path}/{url}", f"file://{tmp_path}/{place}", {}) is covered, (url, place)


@pytest.mark.parametrize("size", [3, 101 * MB], ids=["in one request", "in several"])
def test_the_tag_tells_of_change(store, size):
    """The tag in the plan is the file's tag as long as the file is the same, and another one when it was overwritten."""
    Folder(store).publish("name", b"1" * size)
    planned = find(store, {})[0]

    assert current_tag(planned.path, {}) == (planned.size, planned.tag)
    Folder(store).publish("name", b"2" * size)
    assert current_tag(planned.path, {}) != (planned.size, planned.tag)


def test_folder_markers_are_no_files(server, bucket):
    """Consoles make a folder by an empty object whose name ends in `/`: neither `list` nor `find` takes it for a file."""
    for key in ("store/", "store/deeper/", "store/name"):
        server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"")

    assert Folder(f"{bucket}/store").list() == {"name": 0}
    assert [file.path for file in find(f"{bucket}/store", {})] == [f"{bucket}/store/name"]


WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "secret"),
    "key": ({"AWS_ACCESS_KEY_ID": "wrong"}, "access key"),
    "no credentials": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "Set AWS_ACCESS_KEY_ID"),
    "bucket": ({}, "Create it"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_will_not_pass_is_told_at_once(server, bucket, wrong, monkeypatch):
    """Wrong or no credentials and a missing bucket are a StorageError within 10 s that names the URL and the remedy, at any call."""
    environment, remedy = WRONG[wrong]
    use({name: value for name, value in environment.items() if value}, monkeypatch)
    for name in (name for name, value in environment.items() if value is None):
        monkeypatch.delenv(name)
    url = f"{bucket}-not-there/store" if wrong == "bucket" else f"{bucket}/store"
    folder = Folder(url)
    acts = {
        "probe": folder.probe,
        "find": lambda: find(url, {}),
        "glob": lambda: find(f"{url}/*", {}),
        "list": folder.list,
        "read": lambda: folder.read("name"),
        "open": lambda: folder.open("name"),
        "publish": lambda: folder.publish("name", b"x"),
        "claim": lambda: folder.claim("name", b"x"),
    }
    told = {}
    for act, call in acts.items():
        started = time.monotonic()
        with pytest.raises(StorageError) as error:
            call()
        told[act] = str(error.value)
        assert time.monotonic() - started < TELL, act

    assert [act for act, text in told.items() if url not in text or remedy not in text or "None" in text] == []


@pytest.mark.parametrize("fault", ["down", "stall"])
def test_a_store_that_is_not_there_is_told_soon(server, bucket, fault, monkeypatch):
    """An endpoint that refuses, or that accepts and is silent, is a StorageError within 10 s that names URL and endpoint."""
    for ask in (Folder(f"{bucket}/store").probe, lambda: find(f"{bucket}/store", {})):
        with misbehaving(server, monkeypatch, **{fault: True}) as proxy:
            started = time.monotonic()
            with pytest.raises(StorageError) as error:
                ask()

            assert time.monotonic() - started < TELL
            assert all(word in str(error.value) for word in (bucket, proxy.endpoint, "Check the endpoint"))


def round_trip(folder: Folder, number: int) -> None:
    """Every act once; each must do what it does on a good day."""
    data = random.Random(number).randbytes(9 * MB if number % 5 == 0 else 1000)
    folder.publish(f"name-{number}", data)
    assert same(folder.read(f"name-{number}"), data)
    with folder.open(f"name-{number}") as file:
        assert same(file.read(), data)
    assert folder.claim(f"claim-{number}", b"mine")
    assert not folder.claim(f"claim-{number}", b"theirs")
    expected = {f"name-{n}" for n in range(number + 1)} | {f"claim-{n}" for n in range(number + 1)}
    assert set(folder.list()) == expected


@pytest.mark.parametrize(("fault", "rate", "counter"), [("error_rate", 0.3, "errors"), ("reset_rate", 0.1, "resets")])
def test_errors_and_resets_pass_unnoticed(server, bucket, fault, rate, counter, monkeypatch):
    """With 30 % of the requests answered 503, or 10 % cut by a reset, every call does what it should, the claims included."""
    with misbehaving(server, monkeypatch, **{fault: rate}) as proxy:
        for number in range(100):
            round_trip(Folder(f"{bucket}/store"), number)
            if getattr(proxy, counter) >= 10 and number >= 5:
                return
    pytest.fail(f"only {getattr(proxy, counter)} {counter} in 100 rounds: nothing was shown")


def test_a_slow_store_is_waited_for(server, bucket, monkeypatch):
    """0.1 s before every answer and 8 MB/s: it takes as long as that takes, and works."""
    started = time.monotonic()
    with misbehaving(server, monkeypatch, latency=0.1, bytes_per_second=8 * MB) as proxy:
        round_trip(Folder(f"{bucket}/store"), 0)

        assert time.monotonic() - started > 0.1 * proxy.requests
        assert proxy.bytes_up > 9 * MB
        assert proxy.bytes_down > 18 * MB


@pytest.mark.parametrize("deaths", ["kill", "kill_all"])
def test_a_restart_of_the_store_is_waited_for(server, bucket, deaths):
    """Writers go on while the store is killed and started again; all that they published is there."""
    folder, done = Folder(f"{bucket}/store"), threading.Event()

    def write(writer: int) -> dict[str, bytes]:
        published = {}
        while not done.is_set():
            name, data = f"{writer}-{len(published)}", random.randbytes(MB)
            folder.publish(name, data)
            published[name] = data
        return published

    with ThreadPoolExecutor(3) as threads:
        writers = [threads.submit(write, writer) for writer in range(3)]
        try:
            for _ in range(3 if deaths == "kill" else 1):
                time.sleep(random.uniform(0.3, 0.8))
                getattr(server, deaths)()
                time.sleep(0.5)
                server.start()
        finally:
            time.sleep(0.5)
            done.set()
        published = {name: data for writer in writers for name, data in writer.result().items()}

    assert len(published) >= 3
    assert folder.list() == dict.fromkeys(published, MB)
    assert all(same(folder.read(name), data) for name, data in published.items())


def test_a_reader_outlives_an_outage(server, bucket, monkeypatch):
    """A file that was opened before the store went away for 6 s is read on when it is back."""
    data = random.Random(0).randbytes(20 * MB)
    Folder(bucket).publish("name", data)
    with misbehaving(server, monkeypatch) as proxy, Folder(bucket).open("name") as file:
        assert file.read(1000) == data[:1000]
        proxy.down = True
        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(file.read)
            time.sleep(6)
            proxy.down = False

            assert same(rest.result(), data[1000:])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """On a full disk `publish` is a StorageError that says so; no part of the object stays, and what was there is as it was."""
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

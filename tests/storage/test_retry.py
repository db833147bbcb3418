"""A store that errs, hangs, restarts or refuses: retried, or an error within seconds. Ceph and Swift behind a proxy."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lib.errors import StorageError
from lib.storage.folder import Folder
from lib.storage.listing import find
from lib.storage.retry import PROBE_SECONDS
from tests.conftest import ONE_SERVER, misbehaving, same, use

MB = 1 << 20
MAX_SECONDS = 10.0  # until an error that no retry can mend reaches the user at the terminal


of_the_proxy = pytest.mark.parametrize("server", ["swift"], indirect=True)  # the fault is the same before any store
of_one_store = pytest.mark.parametrize("server", [ONE_SERVER], indirect=True)

WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "secret"),
    "key": ({"AWS_ACCESS_KEY_ID": "wrong"}, "access key"),
    "no credentials": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "Set AWS_ACCESS_KEY_ID"),
    "bucket": ({}, "Create it"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_permanent_error_is_raised_at_once(server, bucket, wrong, monkeypatch):
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
    messages = {}
    for act, call in acts.items():
        started = time.monotonic()
        with pytest.raises(StorageError) as error:
            call()
        messages[act] = str(error.value)
        assert time.monotonic() - started < MAX_SECONDS, act

    assert [act for act, text in messages.items() if url not in text or remedy not in text or "None" in text] == []


@of_the_proxy
@pytest.mark.parametrize("fault", ["down", "stall"])
def test_a_missing_store_is_an_error_soon(server, bucket, fault, monkeypatch):
    """An endpoint that refuses, or that accepts and is silent, is a StorageError within 10 s that names URL and endpoint."""
    for ask in (Folder(f"{bucket}/store").probe, lambda: find(f"{bucket}/store", {})):
        with misbehaving(server, monkeypatch, **{fault: True}) as proxy:
            started = time.monotonic()
            with pytest.raises(StorageError) as error:
                ask()

            assert time.monotonic() - started < MAX_SECONDS
            assert all(word in str(error.value) for word in (bucket, proxy.endpoint, "Check the endpoint"))


@of_the_proxy
def test_a_busy_store_is_not_a_missing_one(server, bucket, monkeypatch):
    """A store that answers 503 to everything, for longer than the limit of a silent store, is retried: it exists."""
    with misbehaving(server, monkeypatch, error_rate=1.0) as proxy:
        threading.Timer(PROBE_SECONDS + 2, setattr, (proxy, "error_rate", 0.0)).start()
        assert find(f"{bucket}/store", {}) == []
    assert proxy.errors > 0


def round_trip(folder: Folder, number: int) -> None:
    """Call every method once; each must do what it does without faults."""
    data = random.Random(number).randbytes(9 * MB if number % 5 == 0 else 1000)
    folder.publish(f"name-{number}", data)
    assert same(folder.read(f"name-{number}"), data)
    with folder.open(f"name-{number}") as file:
        assert same(file.read(), data)
    assert folder.claim(f"claim-{number}", b"mine")
    assert not folder.claim(f"claim-{number}", b"theirs")
    expected = {f"name-{n}" for n in range(number + 1)} | {f"claim-{n}" for n in range(number + 1)}
    assert set(folder.list()) == expected


@of_one_store
@pytest.mark.parametrize(("fault", "rate", "counter"), [("error_rate", 0.3, "errors"), ("reset_rate", 0.1, "resets")])
def test_errors_and_resets_are_retried(server, bucket, fault, rate, counter, monkeypatch):
    """With 30 % of the requests answered 503, or 10 % cut by a reset, every call does what it should, the claims included."""
    with misbehaving(server, monkeypatch, **{fault: rate}) as proxy:
        for number in range(100):
            round_trip(Folder(f"{bucket}/store"), number)
            if getattr(proxy, counter) >= 5 and number >= 1:
                return
    pytest.fail(f"only {getattr(proxy, counter)} {counter} in 100 rounds: nothing was tested")


@of_the_proxy
def test_a_slow_store_works(server, bucket, monkeypatch):
    """With 0.1 s before every answer and 8 MB/s every call works; it takes the time that this costs."""
    started = time.monotonic()
    with misbehaving(server, monkeypatch, latency=0.1, bytes_per_second=8 * MB) as proxy:
        round_trip(Folder(f"{bucket}/store"), 0)

        assert time.monotonic() - started > 0.1 * proxy.requests
        assert proxy.bytes_up > 9 * MB
        assert proxy.bytes_down > 18 * MB


def write_through_deaths(server, bucket: str, deaths: str, count: int) -> None:
    """Writers work while the store dies `count` times and is started again; every published object must be stored.

    deaths: "kill", of its front, or "kill_all", of all its processes.
    """
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
            for _ in range(count):
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


@of_the_proxy
def test_writers_survive_a_restart_of_the_store(server, bucket):
    """Writers continue while the store is killed and started again; every published object is stored."""
    write_through_deaths(server, bucket, "kill", 1)


@of_the_proxy
def test_a_reader_survives_an_outage(server, bucket, monkeypatch):
    """A file that was opened before the store was away for 3 s is read to its end afterwards."""
    data = random.Random(0).randbytes(20 * MB)
    Folder(bucket).publish("name", data)
    with misbehaving(server, monkeypatch) as proxy, Folder(bucket).open("name") as file:
        assert file.read(1000) == data[:1000]
        proxy.down = True
        with ThreadPoolExecutor(1) as thread:
            rest = thread.submit(file.read)
            time.sleep(3)
            proxy.down = False

            assert same(rest.result(), data[1000:])

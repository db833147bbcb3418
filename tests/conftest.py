"""What the tests share: the real S3 servers of `real/`, one each for the whole run, and a fresh place in them for each test."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before anything imports them: no test downloads, and tokenizers fork without a warning.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads make tiny models six times as slow on busy cores
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull

# Ray's workers import the mappers that tests define.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

import fsspec

from tests.real.proxy import FaultProxy
from tests.real.s3 import Ceph, Server, Swift
from tests.support.budget import FileBudget
from tests.support.messages import silence  # noqa: F401
from tests.support.trained import train_here  # noqa: F401

MEMORY = Path("/dev/shm")
ONE_SERVER = "swift" if Ceph.missing() else "ceph"  # of tests that need only one: the quicker one


def _suits(folder: Path) -> bool:
    """Whether tests may write there: some GiB are free, and files have the attributes that Swift keeps."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.setxattr(file.name, "user.test", b"x")
        return shutil.disk_usage(folder).free > 8 << 30
    except OSError:
        return False


def pytest_configure(config: pytest.Config) -> None:
    if _suits(MEMORY):  # each published object is synced, which takes 5 ms on a disk
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    config.pluginmanager.register(FileBudget())


def _serve(kind: type[Server], temporary: pytest.TempPathFactory) -> Iterator[Server]:
    if reason := kind.missing():
        pytest.skip(reason)
    folder = temporary.mktemp(kind.__name__.lower())
    with kind(folder) as server:
        yield server
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory) -> Iterator[Server]:
    yield from _serve(Ceph, tmp_path_factory)


@pytest.fixture(scope="session")
def swift(tmp_path_factory) -> Iterator[Server]:
    yield from _serve(Swift, tmp_path_factory)


@pytest.fixture(params=["ceph", "swift"])
def server(request, monkeypatch) -> Server:
    """Each S3 server in turn, running, with the environment that leads to it."""
    server = request.getfixturevalue(request.param)
    server.start()  # whatever an earlier test has killed
    use(server.environment(), monkeypatch)
    return server


@pytest.fixture
def bucket(server) -> str:
    """A fresh, empty bucket on `server`, as a URL."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    server.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "ceph", "swift"])
def store(request, tmp_path, monkeypatch) -> str:
    """The URL of a fresh, empty folder: on this disk, on Ceph, on Swift."""
    if request.param == "local":
        return str(tmp_path / "store")
    server = request.getfixturevalue(request.param)
    server.start()
    use(server.environment(), monkeypatch)
    server.create_bucket(name := f"test-{uuid.uuid4().hex[:12]}")
    return f"s3://{name}/store"


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment; fsspec's instances, made under another one, are forgotten."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def misbehaving(server, monkeypatch, **faults):
    """A proxy before `server`, with the environment leading to it."""
    with FaultProxy("127.0.0.1", server.ports["s3"]) as proxy:
        use({"AWS_ENDPOINT_URL": proxy.endpoint}, monkeypatch)
        for name, value in faults.items():
            setattr(proxy, name, value)
        yield proxy


def same(got: bytes, expected: bytes) -> bool:
    """As `==`, without pytest's letter by letter comparison of megabytes."""
    return got == expected


@pytest.fixture(scope="session")
def minilm() -> str:
    """The directory of the real all-MiniLM-L6-v2 weights."""
    from benchmarks.demo import minilm

    return minilm()


@pytest.fixture
def docs(tmp_path) -> Path:
    """The folder of a small corpus."""
    from tests.support.embedded import write_docs

    return write_docs(tmp_path)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def build(root) -> Callable[..., Path]:
    """build(kind, **options): a tiny model directory, made once for the same options."""
    from tests.support import tiny

    def make(kind: str, **options) -> Path:
        folder = root / f"{kind}-{abs(hash(json.dumps(options, sort_keys=True)))}"
        return folder if folder.exists() else tiny.build(kind, folder, **options)

    return make


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray on this machine, for all tests that run a job in this process."""
    import ray

    from lib.engine.cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        connect()
    yield
    ray.shutdown()

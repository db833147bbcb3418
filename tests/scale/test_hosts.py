"""A job across three hosts, each with a network of its own; `python -m tests.chaos.hosts` does the rest of what befalls them."""

import os
import subprocess
import time
import uuid

import pytest

from tests.chaos import embed
from tests.chaos.chaos import write_input
from tests.chaos.hosts import embed_once
from tests.conftest import use
from tests.real.hosts import BIN, Hosts, missing

ROWS = 4000
ASK = "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)"

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def test_a_host_that_is_killed_takes_no_row_with_it(ceph, build, tmp_path, monkeypatch):
    """Three hosts share a job; one loses its power; every row is there once."""
    ceph.start()
    use(ceph.environment() | {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}, monkeypatch)
    bucket = f"hosts-{uuid.uuid4().hex[:12]}"
    ceph.create_bucket(bucket)
    write_input(embed, f"s3://{bucket}/in", ROWS, seed=0)
    model = str(build("bert", positions=512, max_seq_length=512))  # slow enough for all to get a share

    seen, problems = embed_once("c", f"s3://{bucket}", ROWS, model, tmp_path / "hosts", ceph)

    assert problems == []
    assert seen["rows"] == f"{ROWS} of {ROWS}"


def test_a_host_is_reached_by_its_cable_alone_and_nothing_is_left_of_it(tmp_path):
    """A server on one host answers the other, not while a cable is out or the power off; then no trace is left."""
    with Hosts(2, tmp_path) as hosts:
        (worker,) = hosts.workers
        serve = ["python", "-m", "http.server", "8000"]
        for host in hosts.all:
            host.boot(serve if host is hosts.head else ["sleep", "1000"], {"PATH": f"{BIN}:{os.environ['PATH']}"})

        def answers() -> bool:
            return worker.run("python", "-c", ASK, f"http://{hosts.head.address}:8000", stderr=-3).wait(30) == 0

        def becomes(reachable: bool) -> bool:
            deadline = time.monotonic() + 30
            while answers() != reachable and time.monotonic() < deadline:
                time.sleep(0.2)
            return time.monotonic() < deadline

        assert becomes(True)
        worker.cut()
        assert becomes(False)
        worker.restore()
        assert becomes(True)
        hosts.head.kill()
        assert becomes(False)
        assert hosts.head.init() is None
        name = hosts.name
    left = subprocess.run("ip netns; ip link", shell=True, capture_output=True, text=True).stdout
    assert name not in left

"""A job across three hosts, each with a network of its own; `python -m tests.chaos.hosts` does the rest of what befalls them."""

import uuid

import pytest

from tests.chaos import embed
from tests.chaos.chaos import write_input
from tests.chaos.hosts import embed_once
from tests.conftest import use
from tests.real.hosts import missing

ROWS = 4000

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

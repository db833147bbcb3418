"""`ray job submit` and jobs/submit_job.py: on one real head with a real S3 server, and on a double of its job server."""

import json
import os
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.engine import submit
from lib.errors import RunError
from lib.storage.folder import Folder
from tests.real.head import Head
from tests.real.s3 import Ceph
from tests.support.job_server import JobEnd, JobServer
from tests.support.messages import listen
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Iterator[Head]:
    """A head whose Python has the project's dependencies but not the project, like a cluster image."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "image")], check=True)
    packages = next((folder / "image").glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    python = str(folder / "image" / "bin" / "python")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [python, "-c", "import ray, torch; import lib"]
    imports = subprocess.run(line, cwd=folder, env=alone, capture_output=True, text=True)
    assert "No module named 'lib'" in imports.stderr
    (folder / "empty").mkdir()
    with Head(folder / "empty", python) as head:
        yield head


@pytest.fixture
def model(tmp_path) -> str:
    return str(build("bert", tmp_path / "model", pooling="mean"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A file of 200 texts."""
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(200), "text": [f"fish number {i}" for i in range(200)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    return tmp_path / "in" / "a.parquet"


def options(source: str | Path, output: str | Path, model: str) -> list[str]:
    line = ["--input", source, "--output", output, "--model", model, "--shard-rows", 50, "--max-workers", 1]
    return [str(word) for word in line]


def rows_in(folder: Folder) -> list[int]:
    parts = sorted(folder.list("part-"))
    return [i for part in parts for i in pq.read_table(pa.BufferReader(folder.read(part)))["id"].to_pylist()]


@pytest.mark.parametrize("server", ["swift" if Ceph.missing() else "ceph"], indirect=True)
def test_submitted_with_its_working_dir(bare, model, corpus, bucket, server):
    """From the checkout, `ray job submit --working-dir . -- python jobs/embed_corpus.py` runs on a cluster that has
    only the dependencies, reads and writes S3, and what was submitted is what runs, in driver and workers."""
    Folder(f"{bucket}/in").publish("a.parquet", corpus.read_bytes())
    environment = json.dumps({"env_vars": server.environment()})  # of a job that brings its own credentials
    words = ["--working-dir", ".", "--runtime-env-json", environment, "--", "python", "jobs/embed_corpus.py"]
    done = bare.submit(*words, *options(f"{bucket}/in", f"{bucket}/out", model), cwd=ROOT)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "rows      200 (0 kept with an error" in done.stdout
    assert rows_in(Folder(f"{bucket}/out")) == list(range(200))


def test_the_address_of_the_dashboard_is_refused(model, corpus, tmp_path):
    """RAY_ADDRESS as `ray job submit` takes it is refused with the other form, at once."""
    environment = os.environ | {"RAY_ADDRESS": "http://127.0.0.1:8265"}
    line = [sys.executable, "jobs/embed_corpus.py", *options(corpus, tmp_path / "out", model)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "HOST:6379" in done.stderr


def config_of(**changes) -> submit.SubmitConfig:
    """The config of a job on the double, or with an address on a real server."""
    return configure(
        submit.SubmitConfig, **({"address": "http://127.0.0.1:9", "command": ("python", "job.py")} | changes)
    )


@pytest.fixture
def run(monkeypatch):
    """Runs submit_until_done without waits: its exit code, the messages, and the shown output."""
    for name in ("PAUSE_SECONDS", "POLL_SECONDS", "REFUSED_SECONDS"):
        monkeypatch.setattr(submit, name, 0.0)
    monkeypatch.setattr(submit, "LOG_BYTES_A_SECOND", 10**9)

    def run(server: JobServer, **changes) -> tuple[int, list[str], str]:
        messages = listen()
        shown: list[str] = []
        code = submit.submit_until_done(config_of(**changes), shown.append, server.client)
        return code, messages, "".join(shown)

    return run


def test_a_real_job_server(bare, tmp_path):
    """A job on Ray's own server: its variables arrive, its output is shown, its exit code is returned, none is submitted again."""
    shown: list[str] = []
    program = "import os, sys; print('try', os.environ['FISH'], flush=True); sys.exit(3)"
    config = config_of(
        address=f"http://127.0.0.1:{bare.dashboard}",
        working_dir=str(tmp_path),
        command=("python", "-c", program),
        env=("FISH=cod",),
    )
    assert submit.submit_until_done(config, shown.append) == 3
    assert [line for line in "".join(shown).splitlines() if line.startswith("try")] == ["try cod"]


def test_a_missing_tree_is_refused(bare, tmp_path):
    """A working directory that does not exist is refused at once."""
    config = config_of(address=f"http://127.0.0.1:{bare.dashboard}", working_dir=str(tmp_path / "none"))
    with pytest.raises(RunError, match="does not take the job"):
        submit.submit_until_done(config, print)


def test_a_job_whose_driver_dies_is_submitted_again(run):
    """A job whose driver was killed is started again; its output is shown once each, and the last exit code is returned."""
    server = JobServer([JobEnd(-9, "first try\n"), JobEnd(0, "second try\n")])
    code, messages, shown = run(server, env=("FISH=cod",))

    assert code == 0
    assert shown == "first try\nsecond try\n"
    assert any("submitting it again" in message for message in messages)
    assert [job["runtime_env"]["env_vars"] for job in server.submitted] == [{"FISH": "cod"}] * 2
    assert {job["entrypoint"] for job in server.submitted} == {"python job.py"}


@pytest.mark.parametrize("code", [2, 3])
def test_a_final_exit_code_ends_the_loop(run, code):
    """A wrong command and quarantined shards end the loop with the job's exit code."""
    server = JobServer([JobEnd(code, "try\n")])
    ended, _, shown = run(server)

    assert ended == code
    assert shown == "try\n"
    assert len(server.submitted) == 1


def test_an_error_that_comes_again_ends_the_loop(run):
    """A job that fails three times in a row is given up, with its last line in the error."""
    server = JobServer([JobEnd(1, "the moon is missing")])
    with pytest.raises(RunError, match=r"ended with exit code 1 .*the moon is missing"):
        run(server)

    assert len(server.submitted) == 3


def test_errors_after_long_work_do_not_end_the_loop(run):
    """A driver that ran for long before another error has done some work: the job is submitted again."""
    ends = [JobEnd(1, f"reason {number}", seconds=submit.LONG_SECONDS) for number in range(5)]
    server = JobServer([*ends, JobEnd(0)])

    assert run(server)[0] == 0
    assert len(server.submitted) == 6


def test_a_job_that_dies_without_end_is_given_up(run):
    """After MAX_FAILURES dead drivers the loop ends."""
    server = JobServer([JobEnd(-9)])
    with pytest.raises(RunError, match="start again"):
        run(server)

    assert len(server.submitted) == submit.MAX_FAILURES


def test_a_forgotten_job_is_submitted_again(run):
    """A head that comes back empty does not know the job any more."""
    server = JobServer([JobEnd(forgotten=True), JobEnd(0)])
    code, messages, _ = run(server)

    assert code == 0
    assert any("does not know it" in message for message in messages)


def test_a_stopped_job_is_not_submitted_again(run):
    """Someone's `ray job stop` counts."""
    server = JobServer([JobEnd(-15, stopped=True)])
    with pytest.raises(RunError, match="was stopped"):
        run(server)

    assert len(server.submitted) == 1


def test_a_running_job_is_followed(run):
    """The same command, started while its job runs, follows that job and submits no other."""
    server = JobServer([JobEnd(-9, "first\n"), JobEnd(0, "second\n")])
    run(server)
    server.listings = 0  # the newest job runs again
    code, messages, shown = run(server)

    assert code == 0
    assert shown == "second\n"
    assert any("following" in message for message in messages)
    assert len(server.submitted) == 2


def test_a_cluster_that_goes_away_is_waited_for(run):
    """Once the cluster has answered, lost connections are waited out."""
    server = JobServer([JobEnd(0)])
    submit_job = server.submit_job

    def submit_and_go_away(**words) -> str:
        server.failures = [ConnectionError("gone"), TimeoutError("gone")]
        return submit_job(**words)

    server.submit_job = submit_and_go_away  # type: ignore[method-assign]
    code, messages, _ = run(server)

    assert code == 0
    assert any("waiting for it" in message for message in messages)
    assert any("is back" in message for message in messages)


def test_an_address_without_a_cluster_is_refused_at_once(tmp_path):
    """Where no job server answers, the error says so and names what to start."""
    line = [sys.executable, str(ROOT / "jobs/submit_job.py"), "--address", "http://127.0.0.1:9", "--", "true"]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )

    assert done.returncode == 1
    assert "no Ray job server answers at http://127.0.0.1:9" in done.stderr

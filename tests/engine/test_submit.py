"""`ray job submit` against a real head, with a real S3 server behind it."""

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

from lib.engine import submit
from lib.errors import RunError
from lib.storage.folder import Folder
from tests.real.head import Head
from tests.real.s3 import Ceph
from tests.support.messages import listen
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Iterator[Head]:
    """A head whose Python has the project's dependencies and nothing of the project, as a cluster image has it."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "image")], check=True)
    packages = next((folder / "image").glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    python = str(folder / "image" / "bin" / "python")
    found = subprocess.run([python, "-c", "import ray, torch; import lib"], cwd=folder, capture_output=True, text=True)
    assert "No module named 'lib'" in found.stderr
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


def test_joined_from_outside_a_job(bare, model, corpus, tmp_path):
    """With RAY_ADDRESS the command, run in the checkout, sends its code to a cluster that has only the dependencies."""
    gone = ("RAY_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    environment |= {"RAY_ADDRESS": bare.address, "PYTHONPATH": str(ROOT)}
    line = [bare.python, str(ROOT / "jobs" / "embed_corpus.py"), *options(corpus, tmp_path / "out", model)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert rows_in(Folder(str(tmp_path / "out"))) == list(range(200))


def test_submitted_bare_to_a_head_in_the_checkout(model, corpus, tmp_path):
    """With a head started in the project's directory, `ray job submit -- python jobs/embed_corpus.py` alone works."""
    job = options(corpus, tmp_path / "out", model)
    with Head(ROOT) as head:
        done = head.submit("--", "python", "jobs/embed_corpus.py", *job, cwd=tmp_path)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert rows_in(Folder(str(tmp_path / "out"))) == list(range(200))


def test_the_address_of_the_dashboard_is_told_apart(model, corpus, tmp_path):
    """RAY_ADDRESS as `ray job submit` takes it is refused with the other form, at once."""
    environment = os.environ | {"RAY_ADDRESS": "http://127.0.0.1:8265"}
    line = [sys.executable, "jobs/embed_corpus.py", *options(corpus, tmp_path / "out", model)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "HOST:6379" in done.stderr


@pytest.fixture
def see_through(bare, tmp_path, monkeypatch):
    """jobs/submit_job.py's work with a program of Python as the job: the exit code, what was said, what the job wrote."""
    monkeypatch.setattr(submit, "PAUSE_SECONDS", 0.0)

    def run(program: str, **options) -> tuple[int, list[str], list[str]]:
        said = listen()
        shown: list[str] = []
        config = submit.SubmitConfig(
            address=f"http://127.0.0.1:{bare.dashboard}",
            working_dir=str(tmp_path),
            command=("python", "-c", program),
            **options,
        )
        code = submit.see_through(config, shown.append)
        return code, said, "".join(shown).splitlines()

    return run


def test_a_job_whose_driver_dies_is_submitted_again(see_through, tmp_path):
    """A job whose driver was killed is started again; its words are shown once each, and it ends with the last one's code."""
    program = (
        f"import os; p = {str(tmp_path.parent / 'been')!r}; been = os.path.exists(p); open(p, 'w'); print('try', been, "
    )
    program += "os.environ['FISH'], flush=True); been or os.kill(os.getpid(), 9)"
    code, said, shown = see_through(program, env=("FISH=cod",))

    assert code == 0
    assert [line for line in shown if line.startswith("try")] == ["try False cod", "try True cod"]
    assert any("submitting it again" in sentence for sentence in said)


@pytest.mark.parametrize("code", [2, 3])
def test_a_job_that_cannot_end_well_is_not_submitted_again(see_through, code):
    """A wrong command and quarantined shards end the loop with the job's exit code."""
    ended, _, shown = see_through(f"import sys; print('try', flush=True); sys.exit({code})")

    assert ended == code
    assert shown.count("try") == 1


def test_an_error_that_comes_again_ends_the_loop(see_through, tmp_path):
    """A job that fails three times in a row is given up, with its last words."""
    log = tmp_path.parent / "tries"
    with pytest.raises(RunError, match=r"ended with exit code 1 .*the moon is missing"):
        see_through(f"import sys; open({str(log)!r}, 'a').write('x'); sys.exit('the moon is missing')")

    assert log.read_text() == "xxx"


def test_a_tree_that_is_not_there_is_told(bare, tmp_path):
    """A working directory that does not exist is the command's mistake, and not waited for."""
    address = f"http://127.0.0.1:{bare.dashboard}"
    config = submit.SubmitConfig(address=address, working_dir=str(tmp_path / "none"), command=("true",))
    with pytest.raises(RunError, match="does not take the job"):
        submit.see_through(config, print, print)


def test_no_cluster_is_told_at_once(tmp_path):
    """Where no job server answers, the command says so and what to start."""
    line = [sys.executable, str(ROOT / "jobs/submit_job.py"), "--address", "http://127.0.0.1:9", "--", "true"]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )

    assert done.returncode == 1
    assert "no Ray job server answers at http://127.0.0.1:9" in done.stderr

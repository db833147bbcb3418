"""A job submitted bare to a head that was started in the checkout, and one that joins a cluster from outside. Run by `make scale`."""

import os
import subprocess

from lib.storage.folder import Folder
from tests.engine import test_submit
from tests.engine.test_submit import ROOT, options, rows_in
from tests.real.head import Head

bare, model, corpus = test_submit.bare, test_submit.model, test_submit.corpus  # fixtures


def test_submitted_bare_to_a_head_in_the_checkout(model, corpus, tmp_path):
    """With a head started in the project's directory, `ray job submit -- python jobs/embed_corpus.py` alone works."""
    job = options(corpus, tmp_path / "out", model)
    with Head(ROOT) as head:
        done = head.submit("--", "python", "jobs/embed_corpus.py", *job, cwd=tmp_path)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert rows_in(Folder(str(tmp_path / "out"))) == list(range(200))


def test_joined_from_outside_a_job(bare, model, corpus, tmp_path):
    """With RAY_ADDRESS the command, run in the checkout, sends its code to a cluster that has only the dependencies."""
    gone = ("RAY_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
    environment |= {"RAY_ADDRESS": bare.address, "PYTHONPATH": str(ROOT)}
    line = [bare.python, str(ROOT / "jobs" / "embed_corpus.py"), *options(corpus, tmp_path / "out", model)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert rows_in(Folder(str(tmp_path / "out"))) == list(range(200))

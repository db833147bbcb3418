"""A job submitted bare to a head that was started in the checkout. Run by `make scale`."""

from lib.storage.folder import Folder
from tests.engine import test_submit
from tests.engine.test_submit import ROOT, options, rows_in
from tests.real.head import Head

model, corpus = test_submit.model, test_submit.corpus  # fixtures


def test_submitted_bare_to_a_head_in_the_checkout(model, corpus, tmp_path):
    """With a head started in the project's directory, `ray job submit -- python jobs/embed_corpus.py` alone works."""
    job = options(corpus, tmp_path / "out", model)
    with Head(ROOT) as head:
        done = head.submit("--", "python", "jobs/embed_corpus.py", *job, cwd=tmp_path)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert rows_in(Folder(str(tmp_path / "out"))) == list(range(200))

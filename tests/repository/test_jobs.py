"""The commands as a user meets them: they explain themselves, and say what is wrong in one sentence."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.embed_corpus import main
from lib.cli.options import configure, flat
from lib.embedding.config import EmbedConfig

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def call(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "jobs/embed_corpus.py", *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_jobs_name_shadows_nothing(job):
    """A script's folder comes first in sys.path, so a job must not have the name of an importable module."""
    assert importlib.util.find_spec(job.stem) is None
    assert "_" in job.stem, "jobs are named verb_noun"


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_is_short(job):
    """Options in, one verb, one report out."""
    assert len(job.read_text().splitlines()) <= 45


def test_no_option_explains():
    """Called with nothing, the job explains itself and shows the shortest working line."""
    done = call()

    assert "Turn every row of a corpus into a vector" in done.stdout + done.stderr
    assert (
        "python jobs/embed_corpus.py --input docs/ --output vectors/ --model BAAI/bge-m3" in done.stdout + done.stderr
    )


def test_every_option_is_documented():
    """--help names every option of the config and of its groups, with a help text."""
    text = call("--help").stdout
    config = configure(EmbedConfig, input="a", output="b")
    declared = {name for group in (config.corpus, config.run, config.model, config.workers) for name in flat(group)}

    assert declared < set(flat(config))
    for name in flat(config):
        assert f"--{name.replace('_', '-')}" in text
    assert all(len(option.help) > 10 for option in main.params)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--input", "/nowhere", "--output", "{tmp}/o", "--model", "{model}"], 1, "nothing at /nowhere"),
        (["--input", "x", "--output", "o"], 2, "no --model"),
        (["--input", "x", "--output", "o", "--recipe", "none-such"], 2, "all-minilm-l6-v2"),
        (["--input", "x", "--output", "o", "--model", "m", "--dtype", "int3"], 2, "bfloat16"),
        (["--input", "x", "--model", "m"], 2, "--output"),
        (["--input", "nope://x", "--output", "{tmp}/o", "--model", "{model}"], 2, "nope"),
    ],
)
def test_a_wrong_command_is_told(words, code, said, tmp_path, minilm):
    """Exit code 2 for a wrong command, 1 for what is not there; one sentence that names it; within seconds."""
    began = time.monotonic()
    done = call(*(word.format(tmp=tmp_path, model=minilm) for word in words))

    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 15

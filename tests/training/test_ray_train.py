"""Training on real Ray Train: two workers compute what one process does, and go on where they were."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.models.encoder import Encoder
from lib.models.encoder_options import ModelOptions, resolve_encoder
from lib.models.tokenizer import Tokenizer
from lib.training.config import FinetuneConfig
from lib.training.job import finetune
from tests.support.trained import write_pairs

STEPS, CHECKPOINT_STEPS = 6, 2


def options(folder: Path, model: Path, name: str, **more) -> dict:
    data = folder / "pairs.jsonl"
    data.exists() or write_pairs(data)
    return {
        "model": str(model),
        "data": (str(data),),
        "output": str(folder / name),
        "batch": 8,
        "group": 3,
        "max_steps": STEPS,
        "checkpoint_steps": CHECKPOINT_STEPS,
        "learning_rate": 1e-3,
        "max_workers": 2,
    } | more


def losses(folder: Path) -> list[float]:
    return pq.read_table(folder / "metrics").sort_by("step")["loss"].to_pylist()


def vectors(model: str) -> np.ndarray:
    spec = resolve_encoder(ModelOptions(model=model)).spec
    return Encoder(spec, dtype="float32").encode(Tokenizer(spec)(["a shoal of fish", "fox", "查询 quick brown"]))


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Path:
    """A folder with a run of two workers."""
    from tests.support import tiny

    folder = tmp_path_factory.mktemp("runs")
    model = tiny.build("bert", folder / "model")
    finetune(configure(FinetuneConfig, **options(folder, model, "two")))
    return folder


def test_two_workers_train_as_one(runs, train_here):
    """The losses of two workers are those of one process on the same slices, dropout and all; so is the model."""
    alone = train_here(**options(runs, runs / "model", "alone"))
    expected, actual = losses(runs / "alone"), losses(runs / "two")

    assert len(actual) == STEPS
    assert np.abs(np.subtract(expected, actual)).max() < 1e-5
    ours, theirs = (vectors(str(model)) for model in (alone.model, runs / "two" / "model"))
    # Weights without effect, such as a key's bias, have gradients of rounding, which Adam scales up to whole steps.
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_lost_end_is_trained_again(runs, cluster):
    """Without scores and exports, the same command trains the end of the run again, from the checkpoint."""
    folder = runs / "two"
    before = losses(folder)
    (folder / "scores.json").unlink()
    for file in (folder / "exports").rglob("_files.json"):
        file.unlink()
    finetune(configure(FinetuneConfig, **options(runs, runs / "model", "two")))

    assert losses(folder) == before
    assert [row["step"] for row in json.loads((folder / "scores.json").read_text())] == [STEPS]

"""Training on real Ray Train: two workers compute what one process does."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

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


def test_two_workers_train_as_one(cluster, build, tmp_path, train_here):
    """The losses of two workers are those of one process on the same slices, dropout and all; so is the model."""
    model = build("bert")
    two = finetune(configure(FinetuneConfig, **options(tmp_path, model, "two")))
    alone = train_here(**options(tmp_path, model, "alone"))
    expected, actual = losses(tmp_path / "alone"), losses(tmp_path / "two")

    assert len(actual) == STEPS
    assert np.abs(np.subtract(expected, actual)).max() < 1e-5
    # Weights without effect, such as a key's bias, have gradients of rounding, which Adam scales up to whole steps.
    assert np.abs(vectors(alone.model) - vectors(two.model)).max() < 1e-4

"""Fine-tuning in the test's own process: the loop, the export and the driver's verb, without Ray and in one rank."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from lib.cli.options import configure
from lib.training import checkpoint
from lib.training.config import FinetuneConfig
from lib.training.job import Finetuned, finetune
from lib.training.loop import TrainRun, advance, export, start
from lib.training.metrics import publish_metrics
from lib.training.ray_train import Pool
from lib.training.step.collectives import Rank
from tests.support.here import ONE

WORDS = [
    "a",
    "shoal",
    "of",
    "fish",
    "swims",
    "together",
    "and",
    "none",
    "leads",
    "the",
    "others",
    "查询",
    "文档",
    "向量",
    "排序",
    "quick",
    "brown",
    "fox",
]


def write_pairs(file: Path, rows: int = 60, negatives: int = 3, seed: int = 0, **more: Any) -> Path:
    """Pairs of random words, each query a part of its positive."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    lines = []
    for number in range(rows):
        positive = f"{text(4, 16)} {number}"
        row = {"query": f"{positive[:24]} {number}", "pos": [positive]}
        if negatives:
            row["neg"] = [f"{text(4, 16)} n{number} {i}" for i in range(negatives)]
        lines.append(json.dumps(row | more))
    file.write_text("\n".join(lines) + "\n")
    return file


def leg_here(course: TrainRun, pool: Pool, keep: int, heard: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    """What launch.run_leg does, in one rank here; its checkpoints are kept in a folder of the run."""
    run = start(course, Rank(0, 1, course.virtual_ranks, course.global_batch), torch.device("cpu"))
    folder = Path(course.output.url) / "here"
    if folder.exists():
        run.step = checkpoint.load(folder, run.trained, run.optimizer)
    for row in advance(run):
        heard([row])
        if "seconds" not in row:
            return
    checkpoint.save(folder, run.step, run.trained, run.optimizer)
    publish_metrics(course.output.below("metrics"), pa.Table.from_pylist(run.metrics))
    export(run)


@pytest.fixture
def train_here(monkeypatch):
    """train(**options) -> Finetuned"""
    monkeypatch.setattr("lib.training.job.connect", lambda: None)
    monkeypatch.setattr("lib.training.job.check_said", lambda options, weight_bytes: None)
    monkeypatch.setattr("lib.training.job.decide", lambda options, weight_bytes: ONE)
    monkeypatch.setattr("lib.training.job.largest_node", lambda labels: 1.0)
    monkeypatch.setattr("lib.training.train_and_evaluate.run_leg", leg_here)

    def train(**options: Any) -> Finetuned:
        return finetune(configure(FinetuneConfig, **options))

    return train

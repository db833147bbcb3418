"""Fine-tuning in the process of the test, by the local executor."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.cli.options import configure
from lib.training.config import FinetuneConfig
from lib.training.job import Finetuned, finetune

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


@pytest.fixture
def train_here() -> Callable[..., Finetuned]:
    """train(**options) -> Finetuned, in this process."""

    def train(**options: Any) -> Finetuned:
        return finetune(configure(FinetuneConfig, **({"executor": "local", "cpus_per_worker": 2} | options)))

    return train

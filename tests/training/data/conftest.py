"""A plan of rows that a test writes, and small buckets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.engine.workers import CpuWorkerOptions
from lib.storage.folder import Folder
from lib.training.data.job import DataOptions, TrainingPlan, plan
from tests.support.training_plans import LOCAL, write


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., TrainingPlan]:
    """make_plan(rows, **options): the plan of rows (dicts, by name of the entry) in tmp_path/out."""

    def run(
        rows: dict[str, Any], output: str = "out", workers: CpuWorkerOptions = LOCAL, **options: Any
    ) -> TrainingPlan:
        paths = []
        for name, entry in rows.items():
            path = tmp_path / f"{name}.jsonl"
            if not path.exists():
                write(path, entry)
            paths.append(str(path))
        options = {"global_batch": 8, "group": 2} | options
        return plan(DataOptions(data=tuple(paths), **options), Folder(str(tmp_path / output)), workers)

    return run


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of four batches, so that few rows make many."""
    monkeypatch.setattr("lib.training.data.sources.MIN_ROWS", 1)
    monkeypatch.setattr("lib.training.data.sources.BUCKET_BATCHES", 4)

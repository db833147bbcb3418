"""Benchmark tasks, one file each, with their data and main score. A task's name leads to its file.

A task module has a docstring and `TASK`. `T2Retrieval` is `t2retrieval.py`; dashes are underscores.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

Kind = Literal["retrieval", "reranking"]
MAIN = {"retrieval": "ndcg_at_10", "reranking": "map_at_1000"}  # mteb's main score of each kind


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of a benchmark.

    kind: "retrieval" searches the whole corpus, "reranking" orders given candidates. dataset, revision: on the Hugging Face hub;
    empty for data of one's own. ignore_identical_ids: a passage with its query's own id does not count. languages: as mteb
    writes them.
    """

    name: str
    kind: Kind = "retrieval"
    dataset: str = ""
    revision: str = ""
    split: str = "test"
    ignore_identical_ids: bool = False
    languages: tuple[str, ...] = ()

    @property
    def main_score(self) -> str:
        return MAIN[self.kind]


def names() -> list[str]:
    return sorted(task.name for task in map(_load, _modules()))


def find(name: str) -> Task | None:
    """The task of that name; None where there is no such file."""
    module = name.lower().replace("-", "_")
    return _load(module) if module in _modules() else None


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _load(module: str) -> Task:
    return importlib.import_module(f"{__name__}.{module}").TASK

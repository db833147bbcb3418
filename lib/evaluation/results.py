"""A result of an evaluation: its scores with their intervals, as files to read and to compare.

results/SYSTEM/TASK.json             every measure, models and options, notes on the data
results/SYSTEM/TASK.md               the same as a page
results/SYSTEM/TASK.queries.parquet  every measure of every query
mteb/SYSTEM/REVISION/TASK.json       the result in mteb's format, for its own tools
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..cli.units import format_duration
from ..engine.parts import parquet_bytes
from ..errors import RunError
from ..storage.folder import Folder
from .metrics import CUTS, MEASURES, NAMES, intervals
from .tasks import Task

MTEB_FORMAT = "2.26.24"  # the version whose layout is written
# Undetermined, in ISO 639 and 15924: mteb averages over languages, and has no score for a result without any.
UNKNOWN_LANGUAGE = "und-Zyyy"
NAMES_OF_MODELS = {"model", "reranker"}  # keys of an identity that are not compared: the revisions are


@dataclass(frozen=True)
class Result:
    """The scores of one system on one task.

    scores: mean over the queries, 0 to 1, by measure. intervals: 95 % of each, by bootstrap. identity: models, options and data;
    results of one system and task agree in it. counts: queries, of them unranked; passages. seconds: of this run, by stage.
    """

    system: str
    task: str
    split: str
    main_score: str
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    identity: Mapping[str, Any]
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def main(self) -> float:
        return self.scores[self.main_score]


def averaged(values: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means and 95 % intervals of the measures of every query (float64 [queries] each)."""
    table = np.stack([values[name] for name in NAMES], axis=1)
    bounds = intervals(table)
    means = table.mean(axis=0)
    return (
        {name: float(mean) for name, mean in zip(NAMES, means, strict=True)},
        {name: (float(low), float(high)) for name, (low, high) in zip(NAMES, bounds, strict=True)},
    )


def write_result(
    folder: Folder, result: Result, task: Task, queries: list[str], values: Mapping[str, np.ndarray]
) -> None:
    """Write the files of a result. Raises RunError where its name has a result of another identity."""
    name = f"results/{result.system}/{result.task}"
    check_same_results(folder, result.system, result.task, result.identity)
    per_query = {"query_id": pa.array(queries, pa.large_string())} | {name: values[name] for name in NAMES}
    folder.publish(f"{name}.queries.parquet", parquet_bytes(pa.table(per_query)))
    folder.publish(f"{name}.md", markdown(result).encode())
    revision = str(result.identity["revision"])
    folder.publish(f"mteb/{result.system}/{revision}/{result.task}.json", _json(as_mteb(result, task)))
    folder.publish(f"{name}.json", _json(asdict(result)))  # last: a result with this file has the others


def check_same_results(folder: Folder, system: str, task: str, identity: Mapping[str, Any]) -> None:
    """Raises RunError where the system's name has a result of the task with another identity."""
    try:
        existing = json.loads(folder.read(f"results/{system}/{task}.json"))["identity"]
    except FileNotFoundError:
        return
    mine = json.loads(json.dumps(identity))
    if differing := sorted(
        name for name in {*existing, *mine} - NAMES_OF_MODELS if existing.get(name) != mine.get(name)
    ):
        difference = "; ".join(f"{name}: there {existing.get(name)!r}, now {mine.get(name)!r}" for name in differing)
        raise RunError(
            f"{folder.url}/results/{system} holds {task} of another system ({difference}). Give this one a --name"
        )


def read_result(text: bytes) -> Result:
    """Raises ValueError, KeyError or TypeError for a text that is no result."""
    values = json.loads(text)
    values["intervals"] = {name: tuple(bounds) for name, bounds in values["intervals"].items()}
    return Result(**values | {"notes": tuple(values["notes"])})


def as_mteb(result: Result, task: Task) -> dict[str, Any]:
    """The result in the layout that mteb's TaskResult reads, rounded as mteb rounds."""
    scores: dict[str, Any] = {name: round(score, 5) for name, score in result.scores.items()}
    scores |= {
        "main_score": round(result.main, 5),
        "hf_subset": "default",
        "languages": list(task.languages) or [UNKNOWN_LANGUAGE],
    }
    return {
        "dataset_revision": task.revision or "local",
        "task_name": result.task,
        "mteb_version": MTEB_FORMAT,
        "scores": {result.split: [scores]},
        "evaluation_time": round(sum(result.seconds.values()), 3),
        "kg_co2_emissions": None,
    }


def markdown(result: Result) -> str:
    """The report of one result."""
    low, high = result.intervals[result.main_score]
    lines = [
        f"# {result.system} on {result.task} ({result.split})",
        "",
        f"**{result.main_score} {result.main:.4f}** (95 % interval {low:.4f} to {high:.4f}), "
        f"{', '.join(f'{count:,} {name}' for name, count in result.counts.items())}.",
        "",
        f"| | {' | '.join(f'@{cut}' for cut in CUTS)} |",
        f"|---|{'---|' * len(CUTS)}",
    ]
    for measure in MEASURES:
        cells = " | ".join(f"{result.scores[f'{measure}_at_{cut}']:.4f}" for cut in CUTS)
        lines.append(f"| {measure} | {cells} |")
    lines += ["", *(f"- {note}" for note in result.notes)]
    lines += [f"- {name}: {value!r}" for name, value in result.identity.items() if value not in (None, "")]
    took = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in result.seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return "\n".join([*lines, f"- time of this run: {took}", f"- versions: {versions}"]) + "\n"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()

"""Compare results with each other and with the scores that the recipes' authors published: Markdown, and one HTML page with bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from .. import recipes
from ..cli.charts import Bar, bar_chart
from ..cli.options import group, option
from ..cli.page import html_page, section
from ..errors import InputError
from ..storage.filesystem import StorageOptions, absolute
from ..storage.folder import Folder
from ..storage.listing import find
from . import tasks
from .results import Result, read_result

PAGE, TEXT = "comparison.html", "comparison.md"
PUBLISHED = "published"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of `jobs/compare_models.py`."""

    input: str = option("Output folder of evaluations; any fsspec URL.")
    output: str | None = option("Folder for comparison.md and .html. Default: the input.", None)
    system: tuple[str, ...] = option("Only these systems, in this order, by commas. Default: all, by name.", ())
    storage: StorageOptions = group(StorageOptions)


@dataclass(frozen=True)
class Row:
    """Scores of a system in percent, by task: measured ones with their 95 % intervals, and published ones."""

    name: str
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    published: Mapping[str, float]


def compare(config: CompareConfig) -> list[str]:
    """Write both files and return their URLs. Raises InputError where there are no results, or none of a named system."""
    storage = config.storage.fsspec
    rows = table(read_results(config.input, storage), config.system)
    folder = Folder(absolute(config.output or config.input), storage)
    folder.probe()
    folder.publish(TEXT, as_markdown(rows).encode())
    folder.publish(PAGE, as_html(rows).encode())
    return [folder.path(TEXT), folder.path(PAGE)]


def read_results(url: str, storage: Mapping[str, Any]) -> list[Result]:
    """Read every result in the output folder of evaluations."""
    folder = Folder(absolute(url), dict(storage))
    names = [file.name for file in find(f"{folder.url.rstrip('/')}/results", storage) if file.name.endswith(".json")]
    if not names:
        raise InputError(f"no results in {url}. They are made by python jobs/evaluate_model.py --output {url}")
    results = []
    for name in names:
        try:
            results.append(read_result(folder.read(f"results/{name}")))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{url}/results/{name} is not a result ({error!r}). Remove it") from error
    return results


def table(results: Sequence[Result], systems: Sequence[str]) -> list[Row]:
    """Make a row of each named system, in that order, or of all systems by name."""
    known = sorted({result.system for result in results})
    if unknown := [name for name in systems if name not in known]:
        raise InputError(f"no results of {unknown[0]!r}. Systems there: {', '.join(known)}")
    _refuse_mixed([result for result in results if result.system in (systems or known)])
    rows = []
    for name in systems or known:
        of_system = [result for result in results if result.system == name]
        bounds = [each.intervals[each.main_score] for each in of_system]
        rows.append(
            Row(
                name,
                {each.task: 100 * each.main for each in of_system},
                {each.task: (100 * low, 100 * high) for each, (low, high) in zip(of_system, bounds, strict=True)},
                _published(of_system[0].identity) if all(map(_is_published_split, of_system)) else {},
            )
        )
    return rows


def _refuse_mixed(results: Sequence[Result]) -> None:
    """Raise InputError where two results of one task's name are of different data: their scores do not compare."""
    first: dict[str, Result] = {}
    for result in results:
        other = first.setdefault(result.task, result)
        for key in ("split", "data", "main_score"):
            value, other_value = result.identity.get(key), other.identity.get(key)
            if value != other_value:
                raise InputError(
                    f"{result.system} and {other.system} were evaluated on other data, both named {result.task} ({key} {value!r} "
                    f"and {other_value!r}). Choose systems with --system, or evaluate one of them anew with a --task of its own"
                )


def _is_published_split(result: Result) -> bool:
    """Return whether published scores of the task are of the same split."""
    known = tasks.find(result.task)
    return known is None or known.split == result.split


def as_markdown(rows: Sequence[Row]) -> str:
    """Write a table with a line for each system; where its scores are published, also those and the difference."""
    names = _tasks(rows)
    lines = [
        "# Comparison",
        "",
        "Main scores in percent: NDCG@10 of retrieval tasks, MAP of reranking tasks; average over the tasks shown, where all "
        "are there. A difference is ours less what was published.",
        "",
        f"| system | {' | '.join(names)} | average |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for row in rows:
        lines.append(_line(row.name, row.scores, names, "{:.2f}"))
        if published := {task: row.published[task] for task in names if task in row.published}:
            lines.append(_line(f"{row.name}, {PUBLISHED}", published, names, "{:.2f}"))
            gaps = {task: row.scores[task] - score for task, score in published.items() if task in row.scores}
            lines.append(_line(f"{row.name}, difference", gaps, names, "{:+.2f}"))
    return "\n".join(lines) + "\n"


def as_html(rows: Sequence[Row]) -> str:
    """Write one page without other files: a chart for each task."""
    note = (
        "<p>Main scores in percent; the line on a bar is the 95&nbsp;% bootstrap interval over the queries. Pale bars: as "
        "published, with the difference above.</p>"
    )
    return html_page("Model comparison", note + "".join(_section(task, rows) for task in _tasks(rows)))


def _section(task: str, rows: Sequence[Row]) -> str:
    """Draw a bar for each system, the best one on top, and below it its published score."""
    measure = known.main_score if (known := tasks.find(task)) else "main score"
    bars = []
    for row in sorted((row for row in rows if task in row.scores), key=lambda row: -row.scores[task]):
        score, published = row.scores[task], row.published.get(task)
        difference = f" ({score - published:+.2f})" if published is not None else ""
        bars.append(Bar(row.name, score, f"{score:.2f}{difference}", row.intervals[task]))
        if published is not None:
            bars.append(Bar(PUBLISHED, published, f"{published:.2f}", faint=True))
    return section(f"{task}: {measure}", bar_chart(bars, 100))


def _published(identity: Mapping[str, Any]) -> Mapping[str, float]:
    """Look up the published scores of a system of one model, by its hub id or by the last name of its folder."""
    model, reranker = identity.get("model"), identity.get("reranker")
    if (model is None) == (reranker is None):
        return {}
    last = str(model or reranker).rstrip("/").rpartition("/")[2]
    for name in recipes.names():
        for published, scores in recipes.load(name).scores.items():
            if published.rpartition("/")[2] == last:
                return scores
    return {}


def _tasks(rows: Sequence[Row]) -> list[str]:
    return sorted({task for row in rows for task in row.scores})


def _line(name: str, scores: Mapping[str, float], names: Sequence[str], form: str) -> str:
    cells = [form.format(scores[task]) if task in scores else "" for task in names]
    average = form.format(mean(scores[task] for task in names)) if all(task in scores for task in names) else ""
    return f"| {name} | {' | '.join(cells)} | {average} |"

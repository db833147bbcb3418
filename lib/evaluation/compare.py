"""Results side by side, beside the scores that the recipes' authors published: Markdown, and one HTML page with bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import mean
from typing import Any

from .. import recipes
from ..errors import InputError
from ..storage.filesystem import absolute, parse_options
from ..storage.folder import Folder
from ..storage.listing import find
from . import tasks
from .results import Result, read_result

PAGE, TEXT = "comparison.html", "comparison.md"
PUBLISHED = "published"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Everything `jobs/compare_models.py` can be told."""

    input: str = field(metadata={"help": "Output folder of evaluations; any fsspec URL."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for comparison.md and .html. Default: the input."}
    )
    system: tuple[str, ...] = field(
        default=(), metadata={"help": "Only these systems, in this order, by commas. Default: all, by name."}
    )
    storage_option: tuple[str, ...] = field(
        default=(),
        metadata={"help": "fsspec option, as endpoint_url=http://host:9000. Repeat it for more.", "many": True},
    )


@dataclass(frozen=True)
class Row:
    """A line of the comparison: scores in percent by task, with 95 % intervals where they were measured."""

    name: str
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    published: Mapping[str, float]


def compare(config: CompareConfig) -> list[str]:
    """Write both files; their URLs. Raises InputError where there are no results, or not of the systems asked for."""
    storage = parse_options(config.storage_option)
    rows = table(read_results(config.input, storage), config.system)
    folder = Folder(absolute(config.output or config.input), storage)
    folder.probe()
    folder.publish(TEXT, as_markdown(rows).encode())
    folder.publish(PAGE, as_html(rows).encode())
    return [folder.path(TEXT), folder.path(PAGE)]


def read_results(url: str, storage: Mapping[str, Any]) -> list[Result]:
    """Every result in the output folder of evaluations."""
    folder = Folder(absolute(url), dict(storage))
    names = [file.name for file in find(f"{folder.url.rstrip('/')}/results", storage) if file.name.endswith(".json")]
    if not names:
        raise InputError(f"no results in {url}. They are made by python jobs/evaluate_model.py --output {url}")
    found = []
    for name in names:
        try:
            found.append(read_result(folder.read(f"results/{name}")))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{url}/results/{name} is not a result ({error!r}). Remove it") from error
    return found


def table(results: Sequence[Result], systems: Sequence[str]) -> list[Row]:
    """A row a system, those asked for, or all."""
    there = sorted({result.system for result in results})
    if unknown := [name for name in systems if name not in there]:
        raise InputError(f"no results of {unknown[0]!r}. Systems there: {', '.join(there)}")
    _refuse_mixed([result for result in results if result.system in (systems or there)])
    rows = []
    for name in systems or there:
        mine = [result for result in results if result.system == name]
        rows.append(
            Row(
                name,
                {each.task: 100 * each.main for each in mine},
                {each.task: _percent(each.intervals[each.main_score]) for each in mine},
                _published(mine[0].identity) if all(map(_as_published, mine)) else {},
            )
        )
    return rows


def _refuse_mixed(results: Sequence[Result]) -> None:
    """Raises InputError where one task's name stands for two data: their scores do not compare."""
    first: dict[str, Result] = {}
    for result in results:
        other = first.setdefault(result.task, result)
        for what in ("split", "data", "main_score"):
            here, there = result.identity.get(what), other.identity.get(what)
            if here != there:
                raise InputError(
                    f"{result.system} and {other.system} were evaluated on other data, both named {result.task} ({what} {here!r} "
                    f"and {there!r}). Choose systems with --system, or evaluate one of them anew with a --task of its own"
                )


def _as_published(result: Result) -> bool:
    known = tasks.find(result.task)
    return known is None or known.split == result.split


def as_markdown(rows: Sequence[Row]) -> str:
    """A table with a line a system, and where its scores are published, those and the difference."""
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
        if told := {task: row.published[task] for task in names if task in row.published}:
            lines.append(_line(f"{row.name}, {PUBLISHED}", told, names, "{:.2f}"))
            gaps = {task: row.scores[task] - score for task, score in told.items() if task in row.scores}
            lines.append(_line(f"{row.name}, difference", gaps, names, "{:+.2f}"))
    return "\n".join(lines) + "\n"


def as_html(rows: Sequence[Row]) -> str:
    """One page, no other file: for each task a bar a system, the interval as a line on it, published scores hatched."""
    sections = "".join(_section(task, rows) for task in _tasks(rows))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Model comparison</title><style>{STYLE}</style><h1>Model comparison</h1>"
        "<p>Main scores in percent, with 95&nbsp;% bootstrap intervals over the queries. Hatched: as published.</p>"
        f"{sections}</html>\n"
    )


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b2733}
h2{margin:1.6rem 0 .4rem;font-size:1.05rem}
.row{display:grid;grid-template-columns:17rem 1fr 9rem;gap:.6rem;align-items:center;margin:.2rem 0}
.name{text-align:right;overflow-wrap:anywhere}
.track{position:relative;height:1.1rem;background:#eef2f5;border-radius:3px}
.bar{position:absolute;inset:0 auto 0 0;background:#2a78b8;border-radius:3px}
.told .bar{background:repeating-linear-gradient(45deg,#9bb8cc 0 5px,#c9d9e4 5px 10px)}
.range{position:absolute;top:45%;height:2px;background:#10202e}
.told,.gap{color:#5b6b78}
"""


def _section(task: str, rows: Sequence[Row]) -> str:
    measure = known.main_score if (known := tasks.find(task)) else "main score"
    bars = []
    for row in sorted((row for row in rows if task in row.scores), key=lambda row: -row.scores[task]):
        score, told = row.scores[task], row.published.get(task)
        gap = f" <span class=gap>({score - told:+.2f})</span>" if told is not None else ""
        bars.append(_bar(row.name, score, f"{score:.2f}{gap}", row.intervals[task]))
        if told is not None:
            bars.append(_bar(PUBLISHED, told, f"{told:.2f}", None))
    return f"<section><h2>{escape(task)} <small>{measure}</small></h2>{''.join(bars)}</section>"


def _bar(name: str, score: float, label: str, bounds: tuple[float, float] | None) -> str:
    line = f"<i class=range style='left:{bounds[0]:.2f}%;width:{bounds[1] - bounds[0]:.2f}%'></i>" if bounds else ""
    kind = "row" if bounds else "row told"
    return (
        f"<div class='{kind}'><span class=name>{escape(name)}</span>"
        f"<span class=track><i class=bar style='width:{score:.2f}%'></i>{line}</span><span>{label}</span></div>"
    )


def _published(identity: Mapping[str, Any]) -> Mapping[str, float]:
    """The published scores of a system of one model: of the hub id that it is, or whose last name its folder has."""
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


def _percent(bounds: tuple[float, float]) -> tuple[float, float]:
    return 100 * bounds[0], 100 * bounds[1]

"""A training run on one HTML page: curves drawn here as SVG, tables, nothing fetched from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

POINTS = 1000  # a curve, at most
SMOOTHED = 50  # a smoothed value is the mean over one in so many of the run's steps, and at least 1
LATE = 10  # the last one in so many of a dataset's steps
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 230, 70, 30, 10, 34
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1b2733;background:#fff}
h1{font-size:1.5rem;overflow-wrap:anywhere} h2{font-size:1.05rem;margin:1.8rem 0 .4rem}
table{border-collapse:collapse;width:100%} th,td{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}
td{overflow-wrap:anywhere;border-top:1px solid #e3e9ee} th{font-weight:600;white-space:nowrap}
tr>th:first-child{border-top:1px solid #e3e9ee} thead th{border:0;color:#5b6b78}
.number{text-align:right;font-variant-numeric:tabular-nums} .best td,.best th{font-weight:700}
svg{display:block;width:100%;height:auto} svg text{font:12px system-ui,sans-serif;fill:#5b6b78}
.grid{stroke:#e3e9ee} .curve{fill:none;stroke:#2a78b8;stroke-width:1.6;stroke-linejoin:round}
.faint{fill:none;stroke:#b4cde0;stroke-width:1} .dot{fill:#2a78b8} .mark{fill:#d5541e} svg .marked{fill:#d5541e;font-weight:600}
p{color:#5b6b78;margin:.3rem 0}
@media print{body{margin:0;max-width:none;font-size:11px} section{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Curve:
    """steps int64 and values float64, [n] each, finite; kind: its class in STYLE, "dot" for points on a line."""

    steps: np.ndarray
    values: np.ndarray
    kind: str = "curve"


def page(
    title: str,
    facts: Mapping[str, Any],
    table: pa.Table,
    evaluations: Sequence[Mapping[str, float]],
    options: Mapping[str, Any],
    versions: Mapping[str, str],
    measure: str = "ndcg_at_10",
) -> str:
    """The page of a run.

    facts: of the run, in their order. table: as watch.SCHEMA, by step, each step once. evaluations: a step and its
    measures each, by name; of `measure` more is better, and it is drawn.
    """
    sections = [_facts(facts), *_curves(table)]
    if evaluations:
        sections.append(_evaluations(evaluations, measure))
    if table.num_rows:
        sections.append(_section("Loss by dataset", _by_dataset(table)))
    sections += [_section("Options", _pairs(options)), _section("Versions", _pairs(versions))]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{''.join(sections)}</body></html>\n"
    )


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the points, both ends among them: of each stretch the lowest and the highest, so that no peak
    is lost."""
    if len(steps) <= points:
        return steps, values
    edges = np.linspace(1, len(steps) - 1, (points - 2) // 2 + 1).astype(int)
    kept = {0, len(steps) - 1}
    for start, end in pairwise(edges):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    places = np.array(sorted(kept))
    return steps[places], values[places]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Means over the `width` values around each, fewer at the ends: float64 [n]."""
    sums, half = np.concatenate([[0.0], np.cumsum(values)]), width // 2
    places = np.arange(len(values))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((sums[end] - sums[start]) / (end - start))


def chart(curves: Sequence[Curve], marked: tuple[float, float, str] | None = None) -> str:
    """Values over steps as SVG. marked: step, value and label of a point that stands out."""
    steps = np.concatenate([curve.steps for curve in curves])
    values = np.concatenate([curve.values for curve in curves])
    left, right = _room(float(steps.min()), float(steps.max()), 0.0)
    low, high = _room(float(values.min()), float(values.max()), 0.04)

    def x(step: float) -> float:
        return round(LEFT + (step - left) / (right - left) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{_number(tick)}</text>'
        for tick in _ticks(low, high)
    ]
    drawn += [
        f'<text x="{x(tick)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(tick)}</text>'
        for tick in _ticks(left, right, 8)
        if tick == int(tick)
    ]
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    for curve in curves:
        places = [(x(step), y(value)) for step, value in zip(*thin(curve.steps, curve.values), strict=True)]
        line = "curve" if curve.kind == "dot" else curve.kind
        drawn.append(f'<polyline class="{line}" points="{" ".join(f"{a},{b}" for a, b in places)}"/>')
        if curve.kind == "dot":
            drawn += [f'<circle class="dot" cx="{a}" cy="{b}" r="3"/>' for a, b in places]
    if marked:
        a, b, side = x(marked[0]), y(marked[1]), "end" if x(marked[0]) > WIDTH / 2 else "start"
        away = a - 8 if side == "end" else a + 8
        drawn.append(f'<circle class="mark" cx="{a}" cy="{b}" r="5"/>')
        drawn.append(f'<text class="marked" x="{away}" y="{b + 16}" text-anchor="{side}">{escape(marked[2])}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _curves(table: pa.Table) -> list[str]:
    """Loss, learning rate, norm of the gradients and speed over the steps."""
    if not table.num_rows:
        return [_section("Loss", "<p>No step was done.</p>")]
    steps, width = table["step"].to_numpy(), max(1, table.num_rows // SMOOTHED)
    names = ("loss", "lr", "gradient_norm", "tokens", "seconds")
    columns = {name: table[name].to_numpy(zero_copy_only=False).astype(float) for name in names}
    tokens, seconds = smooth(columns["tokens"], width), smooth(columns["seconds"], width)
    sections = []
    for title, values, smoothed in (
        ("Loss", columns["loss"], True),
        ("Learning rate", columns["lr"], False),
        ("Norm of the gradients", columns["gradient_norm"], True),
        ("Tokens a second", tokens / np.maximum(seconds, 1e-9), False),
    ):
        finite = np.isfinite(values)
        if not finite.any():
            continue
        kept, shown = steps[finite], values[finite]
        curves = [Curve(kept, shown, "faint"), Curve(kept, smooth(shown, width))] if smoothed else [Curve(kept, shown)]
        lost = int((~finite).sum())
        note = f"<p>{lost:,} steps without a number are left out.</p>" if lost else ""
        sections.append(_section(title, chart(curves) + note))
    return sections


def _evaluations(evaluations: Sequence[Mapping[str, float]], measure: str) -> str:
    """The measure over the steps, its best marked, and a table of all measures."""
    said = sorted(evaluations, key=lambda each: each["step"])
    of_measure = [each for each in said if math.isfinite(each.get(measure, math.nan))]
    best = max(of_measure, key=lambda each: each[measure]) if of_measure else None
    drawn = ""
    if best is not None:
        steps = np.array([each["step"] for each in of_measure], dtype=np.int64)
        values = np.array([each[measure] for each in of_measure], dtype=float)
        label = f"best {best[measure]:.4f} at step {best['step']:,.0f}"
        drawn = chart([Curve(steps, values, "dot")], (best["step"], best[measure], label))
    names = sorted({name for each in said for name in each} - {"step"}, key=lambda name: (name != measure, name))
    rows = [
        (each is best, [f"{each['step']:,.0f}", *(f"{each[name]:.4f}" if name in each else "" for name in names)])
        for each in said
    ]
    return _section(f"Evaluation: {measure}", drawn + _table(["step", *names], rows))


def _by_dataset(table: pa.Table) -> str:
    names = np.array([name or "" for name in table["dataset"].to_pylist()])
    loss, tokens, rows = (table[name].to_numpy(zero_copy_only=False) for name in ("loss", "tokens", "rows"))
    found = []
    for name in np.unique(names):
        mine = np.flatnonzero(names == name)
        late = mine[-max(1, len(mine) // LATE) :]
        counts = (len(mine), int(rows[mine].sum()), int(tokens[mine].sum()))
        means = (_mean(loss[mine]), _mean(loss[late]))
        found.append((False, [str(name), *(f"{n:,}" for n in counts), *(f"{mean:.4f}" for mean in means)]))
    return _table(["dataset", "steps", "samples", "tokens", "mean loss", "of its last tenth"], found)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _facts(facts: Mapping[str, Any]) -> str:
    return f"<section>{_pairs(facts)}</section>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _pairs(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><th>{escape(str(name))}</th><td>{escape(_text(value))}</td></tr>" for name, value in values.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _table(names: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    """The first column is of names, the others of numbers; a row that is best stands out."""
    kinds = ["", *[' class="number"'] * (len(names) - 1)]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        ('<tr class="best">' if best else "<tr>")
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))
        + "</tr>"
        for best, cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with some room around it; one number alone gets a range too."""
    room = (high - low) * share or (0.0 if high > low else abs(high) * 0.05 or 0.5)
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in the range, about `count`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"

"""Charts as SVG text, drawn by matplotlib: curves and bars. The same numbers give the same bytes."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

POINTS = 1000  # drawn of a curve, at most
BLUE, FAINT, ORANGE, GREEN = "#2a78b8", "#b4cde0", "#d5541e", "#4a9a4a"  # of data
INK, GREY, LINES = "#10202e", "#5b6b78", "#e3e9ee"  # of intervals, text, grid
COLOURS = (ORANGE, BLUE, GREEN)  # of several curves with names, in order
WIDTH, HEIGHT, BAR_HEIGHT = 7.6, 2.6, 0.24  # inches
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay text: small, searchable, no font inside
    "svg.hashsalt": "shoal",  # identifiers depend on the content alone
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],  # matplotlib measures with the first, which it brings along
    "font.size": 9.0,
    "text.color": GREY,
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINES),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size"), 0.0),
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Curve:
    """Values y at places x: numbers, [n] each, finite. name: in the legend, for more than one. dots: mark every point."""

    x: np.ndarray
    y: np.ndarray
    name: str = ""
    colour: str = BLUE
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """A value with its label; interval: bounds, drawn as a line on the bar. faint: of another source than the others."""

    name: str
    value: float
    label: str
    interval: tuple[float, float] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Note:
    """Text beside a point."""

    x: float
    y: float
    text: str


def line_chart(
    curves: Sequence[Curve], x_label: str, best: Note | None = None, notes: Sequence[Note] = (), x_scale: str = "linear"
) -> str:
    """Draw curves, one highlighted point, and notes above other points. x_scale: "linear" for whole numbers, or "log"."""
    from matplotlib.ticker import LogLocator

    with _figure(HEIGHT) as (figure, axes):
        axes.set_xscale(x_scale)
        if x_scale == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        for curve in curves:
            x, y = thin(curve.x, curve.y)
            style = {"color": curve.colour, "linewidth": 1.0 if curve.colour == FAINT else 1.6, "clip_on": False}
            axes.plot(x, y, label=curve.name, marker="o" if curve.dots else "", markersize=4, **style)
        if any(curve.name for curve in curves):
            axes.legend(frameon=False, loc="lower right")
        if best:
            axes.plot([best.x], [best.y], marker="o", markersize=7, color=ORANGE, clip_on=False)
            right = best.x > (curves[0].x.min() + curves[0].x.max()) / 2
            _annotate(axes, best, (-8 if right else 8, 4), "right" if right else "left", color=ORANGE, weight="bold")
        for note in notes:
            _annotate(axes, note, (0, 5), "center")
        axes.set_xlabel(x_label)
        return _svg(figure)


def bar_chart(bars: Sequence[Bar], limit: float) -> str:
    """Draw horizontal bars from 0 to `limit`, the first one on top, with their labels beside them."""
    with _figure(BAR_HEIGHT * (len(bars) + 1)) as (figure, axes):
        places, values = np.arange(len(bars)), [bar.value for bar in bars]
        axes.barh(places, values, height=0.75, color=[FAINT if bar.faint else BLUE for bar in bars], clip_on=False)
        for place, bar in zip(places, bars, strict=True):
            if bar.interval:
                axes.hlines(place, *bar.interval, color=INK, linewidth=1.6, clip_on=False)
            axes.text(limit, place, f" {bar.label}", va="center")
        axes.set_yticks(places, [bar.name for bar in bars])
        axes.set_xlim(0, limit)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        return _svg(figure)


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most `points` of the points: both ends, and of each stretch the lowest and the highest: no peak is lost."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(1, len(x) - 1, (points - 2) // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in pairwise(edges):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    places = np.array(sorted(kept))
    return x[places], y[places]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Average the `width` values around each one, fewer at the ends: float64 [n]."""
    sums, half = np.concatenate([[0.0], np.cumsum(values)]), width // 2
    places = np.arange(len(values))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((sums[end] - sums[start]) / (end - start))


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    """Open an empty chart of WIDTH. matplotlib is imported for the first chart: it takes a second."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in letters that DejaVu lacks: the reader's browser has them
        figure = Figure(figsize=(WIDTH, height))
        yield figure, figure.subplots()


def _annotate(axes: Any, note: Note, offset: tuple[float, float], side: str, **style: Any) -> None:
    place = {"xytext": offset, "textcoords": "offset points", "horizontalalignment": side}
    axes.annotate(note.text, (note.x, note.y), **place, **style, annotation_clip=False)


def _svg(figure: Any) -> str:
    """Return the SVG element alone, as it may stand inside a page: without date, program and names of groups."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg ") :]).replace("<svg ", '<svg role="img" ', 1)

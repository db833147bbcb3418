"""Charts: every point where its axes say, every name as text, the same bytes for the same numbers, nothing to fetch."""

import re
import subprocess
import sys

import numpy as np
import pytest

from lib.cli.charts import (
    BLUE,
    COLOURS,
    FAINT,
    INK,
    ORANGE,
    POINTS,
    Bar,
    Curve,
    Note,
    bar_chart,
    line_chart,
    smooth,
    thin,
)
from tests.support.charts import bars, curve, paths, texts, ticks


def test_a_curve_goes_through_its_points() -> None:
    """Every point lies where the numbers along both axes put it."""
    x, y = np.array([10, 20, 30, 60]), np.array([0.5, 0.9, -0.3, 0.2])
    svg = line_chart([Curve(x, y)], "step")
    points = curve(svg, BLUE)

    np.testing.assert_allclose(points[:, 0], x, atol=0.01)
    np.testing.assert_allclose(points[:, 1], y, atol=0.01)
    assert "step" in texts(svg)


def test_steps_are_whole_numbers() -> None:
    """Between step 1 and step 4 there is no step 1.5."""
    _, steps = ticks(line_chart([Curve(np.arange(1, 5), np.ones(4))], "step"), 0)

    assert steps.tolist() == [1, 2, 3, 4]


def test_curves_have_names_and_points_notes() -> None:
    """A legend names each curve, in its colour; a highlighted point and notes have their texts, as they are."""
    x, y = np.array([0.01, 0.1, 1.0]), np.array([0.2, 0.5, 0.9])
    curves = [
        Curve(x, y * share, name, colour, dots=True)
        for share, name, colour in zip((1, 0.5), "ab", COLOURS[:2], strict=True)
    ]
    svg = line_chart(curves, "ms", Note(1.0, 0.9, "best <1> & $x_1$"), [Note(0.01, 0.2, "nprobe 4")], x_scale="log")

    assert {"a", "b", "ms", "best <1> & $x_1$", "nprobe 4"} <= set(texts(svg))
    assert all(paths(svg, f"stroke: {colour}") for colour in COLOURS[:2])
    assert {"0.01", "0.1", "1"} <= set(texts(svg))
    points = max(paths(svg, f"fill: none; stroke: {COLOURS[1]}"), key=len)
    assert np.ptp(np.diff(points[:3, 0])) < 0.01


def test_bars_are_as_long_as_their_values() -> None:
    """The first bar is on top; an interval is a line; a faint bar has its own colour."""
    svg = bar_chart(
        [Bar("first", 80, "80.00", (70, 85)), Bar("published", 75, "75.00", faint=True), Bar("b", 20, "")], 100
    )

    assert bars(svg, BLUE) == pytest.approx([80, 20], abs=0.01)
    assert bars(svg, FAINT) == pytest.approx([75], abs=0.01)
    assert {"first", "published", "b"} <= set(texts(svg))
    assert [text.strip() for text in texts(svg) if "." in text] == ["80.00", "75.00"]
    (interval,) = paths(svg, f"stroke: {INK}")
    pixels, values = ticks(svg, 0)
    np.testing.assert_allclose(np.interp(interval[:, 0], pixels, values), [70, 85], atol=0.01)


def test_names_in_any_script(recwarn: pytest.WarningsRecorder) -> None:
    """Letters that matplotlib's own font lacks stay text, without a warning."""
    assert "模型 😀" in texts(bar_chart([Bar("模型 😀", 50, "50.00")], 100))
    assert not recwarn.list


def test_a_chart_stands_alone() -> None:
    """One SVG element: no document around it, no date, no program, no link but to itself."""
    for svg in (line_chart([Curve(np.arange(9), np.arange(9.0))], "step"), bar_chart([Bar("a", 1, "")], 2)):
        rest = re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)
        assert svg.startswith("<svg ")
        assert svg.rstrip().endswith("</svg>")
        assert not re.search(r"https?:|//|url\((?!#)|href=\"(?!#)|<script|<image|@import|matplotlib|<metadata", rest)


def test_the_same_numbers_give_the_same_bytes() -> None:
    """In another process too: a report that is written again does not change."""
    program = (
        "import numpy as np; from lib.cli.charts import *\n"
        "print(line_chart([Curve(np.arange(9), np.arange(9.0) ** 2, dots=True)], 'step', Note(3, 9.0, 'best')), end='')"
    )
    first, second = (subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(2))

    assert first.stdout == second.stdout
    assert first.stdout.startswith(b"<svg ")


def test_a_single_point_is_a_chart_too() -> None:
    for scale in ("linear", "log"):
        svg = line_chart(
            [Curve(np.array([1]), np.array([0.0]), dots=True)], "step", Note(1, 0.0, "best"), x_scale=scale
        )
        assert paths(svg, ORANGE)


def test_thinning_keeps_ends_and_peaks() -> None:
    """100,000 points become at most 1,000, in order, with the highest and the lowest of all."""
    steps, values = np.arange(100_000), np.random.default_rng(0).normal(size=100_000)
    values[54_321], values[12_345] = 99.0, -99.0
    kept, shown = thin(steps, values)

    assert 900 < len(kept) <= POINTS
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, 99_999)
    assert (shown.max(), shown.min()) == (99.0, -99.0)
    assert len(thin(steps[:1000], values[:1000])[0]) == 1000


def test_smoothing_is_a_mean_of_neighbours() -> None:
    """Fewer of them at the ends, so that the curve begins and ends with the run."""
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0, 4.0]), 3), [1.5, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0]), 1), [1.0, 2.0])

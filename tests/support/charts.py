"""The content of a chart: its texts, and the points of its lines and bars in the units of its axes."""

import re
from xml.etree import ElementTree

import numpy as np

NAMESPACE = "{http://www.w3.org/2000/svg}"
BASELINE = 3.4  # pixels that the foot of a number beside an axis lies below its middle, about


def charts(page: str) -> list[str]:
    """The SVG elements of a page, in order."""
    return re.findall(r"<svg .*?</svg>", page, re.DOTALL)


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")]


def paths(svg: str, style: str) -> list[np.ndarray]:
    """The points of every path whose style has these words, float64 [n, 2] in pixels."""
    shapes = []
    for path in ElementTree.fromstring(svg).iter(f"{NAMESPACE}path"):
        if style in path.get("style", ""):
            numbers = re.findall(r"[-\d.]+", path.get("d", ""))
            shapes.append(np.array(numbers, float).reshape(-1, 2))
    return shapes


def curve(svg: str, colour: str) -> np.ndarray:
    """The points of the longest line of a colour, float64 [n, 2] in the units of both axes, which are linear."""
    points = max(paths(svg, f"fill: none; stroke: {colour}"), key=len)
    return np.stack([np.polyval(np.polyfit(*ticks(svg, axis), 1), points[:, axis]) for axis in (0, 1)], axis=1)


def bars(svg: str, colour: str) -> list[float]:
    """The lengths of the bars of a colour, from the top, in the units of the axis below."""
    shapes = sorted(paths(svg, f"fill: {colour}"), key=lambda shape: shape[:, 1].min())
    assert len({shape[:, 0].min() for shape in shapes}) == 1
    scale, _ = np.polyfit(*ticks(svg, 0), 1)
    return [float(np.ptp(shape[:, 0]) * scale) for shape in shapes]


def ticks(svg: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and values of the numbers along an axis: 0 below the chart, 1 beside it."""
    anchor, place, shift = ("middle", "x", 0.0) if axis == 0 else ("end", "y", BASELINE)
    pixels, values = [], []
    for text in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text"):
        number = (text.text or "").replace("\N{MINUS SIGN}", "-")
        if f"text-anchor: {anchor}" in text.get("style", "") and re.fullmatch(r"-?[\d.]+", number):
            pixels.append(float(text.get(place, "nan")) - shift)
            values.append(float(number))
    return np.array(pixels), np.array(values)

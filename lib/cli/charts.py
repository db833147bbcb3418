"""Recall against speed as one SVG: nothing is fetched, nothing else is needed to see it."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 60, 20, 20, 46
COLOURS = {"recall@1": "#d5541e", "recall@10": "#2a78b8", "recall@100": "#4a9a4a"}
STEPS = 5  # lines across


def curve(rows: Sequence[Mapping[str, Any]], effort: str) -> str:
    """rows: a card's `recall`. Milliseconds of a core a query to the right, on a logarithmic scale; recall upwards."""
    times = [max(row["core_ms"], 1e-6) for row in rows]
    low, high = math.log10(min(times)), math.log10(max(times))
    span = max(high - low, 0.1)

    def across(milliseconds: float) -> float:
        return LEFT + (math.log10(max(milliseconds, 1e-6)) - low) / span * (WIDTH - LEFT - RIGHT)

    def up(recall: float) -> float:
        return HEIGHT - BOTTOM - recall * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    ]
    for step in range(STEPS + 1):
        y = up(step / STEPS)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{step / STEPS:.1f}</text>')
    for row, time in zip(rows, times, strict=True):
        label = f"{row['effort']}" if effort else ""
        parts.append(f'<text x="{across(time):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for number, (name, colour) in enumerate(COLOURS.items()):
        points = [(across(time), up(row[name][0])) for row, time in zip(rows, times, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{LEFT + 10 + 90 * number}" y="{TOP - 6}" fill="{colour}">{name}</text>')
    said = f"{escape(effort)}, at ms of a core a query from {min(times):.3g} to {max(times):.3g} (logarithmic)"
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{said}</text></svg>')
    return "\n".join(parts)

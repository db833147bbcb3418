"""The report of a training run: one HTML page with curves and tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..cli.charts import FAINT, Curve, Note, line_chart, smooth
from ..cli.page import html_page, number_table, section, value_table

SMOOTHED = 50  # a smoothed value is the mean over one in so many of the run's steps, and at least 1
LATE = 10  # the last one in so many of a dataset's steps


def page(
    title: str,
    facts: Mapping[str, Any],
    table: pa.Table,
    scores: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """Write the page of a run.

    facts: of the run, in their order. table: as metrics.SCHEMA, by step, each step once. scores: rows of a step, in order, and
    of those that were evaluated the name `measure`, of which more is better, and its value under that name.
    """
    sections = [f"<section>{value_table(facts)}</section>", *_curves(table)]
    if measured := [row for row in scores if "measure" in row]:
        sections.append(_evaluations(measured, measured[0]["measure"]))
    if table.num_rows:
        sections.append(section("Loss by dataset", _by_dataset(table)))
    sections += [section("Options", value_table(options)), section("Versions", value_table(versions))]
    return html_page(title, "".join(sections))


def _curves(table: pa.Table) -> list[str]:
    """Draw loss, learning rate, norm of the gradients and speed over the steps."""
    if not table.num_rows:
        return [section("Loss", "<p>No step was done.</p>")]
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
        x, y = steps[finite], values[finite]
        curves = [Curve(x, y, colour=FAINT), Curve(x, smooth(y, width))] if smoothed else [Curve(x, y)]
        left_out = int((~finite).sum())
        note = f"<p>{left_out:,} steps without a number are left out.</p>" if left_out else ""
        sections.append(section(title, line_chart(curves, "step") + note))
    return sections


def _evaluations(measured: Sequence[Mapping[str, Any]], measure: str) -> str:
    """Draw the measure over the steps, its best value highlighted, above a table of its values."""
    steps, values = (np.array([row[name] for row in measured]) for name in ("step", measure))
    best = int(values.argmax())
    note = Note(steps[best], values[best], f"best {values[best]:.4f} at step {steps[best]:,}")
    chart = line_chart([Curve(steps, values, dots=True)], "step", best=note)
    rows = [[f"{step:,}", f"{value:.4f}"] for step, value in zip(steps, values, strict=True)]
    return section(f"Evaluation: {measure}", chart + number_table(["step", measure], rows, best))


def _by_dataset(table: pa.Table) -> str:
    datasets = np.array([name or "" for name in table["dataset"].to_pylist()])
    loss, tokens, samples = (table[name].to_numpy(zero_copy_only=False) for name in ("loss", "tokens", "rows"))
    rows = []
    for name in np.unique(datasets):
        places = np.flatnonzero(datasets == name)
        late = places[-max(1, len(places) // LATE) :]
        counts = (len(places), int(samples[places].sum()), int(tokens[places].sum()))
        means = (_mean(loss[places]), _mean(loss[late]))
        rows.append([str(name), *(f"{count:,}" for count in counts), *(f"{mean:.4f}" for mean in means)])
    return number_table(["dataset", "steps", "samples", "tokens", "mean loss", "of its last tenth"], rows)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan

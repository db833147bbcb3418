"""The chart of an index card: every measured point, with the value of the search parameter."""

import numpy as np

from lib.cli.charts import COLOURS
from lib.index.build.card import recall_chart
from tests.support.charts import paths, texts

MEASURED = [(1, 0.01, 0.5), (4, 0.02, 0.75), (16, 0.04, 0.9), (64, 0.08, 0.98)]


def row(value: int | None, milliseconds: float, recall: float) -> dict:
    return {"value": value, "core_ms": milliseconds} | {f"recall@{cut}": [recall, 0.0, 1.0] for cut in (1, 10, 100)}


def test_recall_over_time() -> None:
    """A line for each of recall@1, 10 and 100; equal factors of time are equally far apart."""
    svg = recall_chart([row(*each) for each in MEASURED], "nprobe")
    written = texts(svg)

    assert {"recall@1", "recall@10", "recall@100", "1", "4", "16", "64"} <= set(written)
    assert any("nprobe" in text for text in written)
    for colour in COLOURS:
        points = max(paths(svg, f"fill: none; stroke: {colour}"), key=len)
        assert len(points) == len(MEASURED)
        assert np.ptp(np.diff(points[:, 0])) < 0.01
        assert (np.diff(points[:, 1]) < 0).all()  # pixels count downwards


def test_an_index_without_a_search_parameter() -> None:
    """A single point, whose search may take no time that a clock sees."""
    assert "recall@10" in texts(recall_chart([row(None, 0.0, 1.0)], ""))

"""The metrics of a training run: its live line, metrics files, TensorBoard events and report page."""

import io
import re
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.cli import progress
from lib.cli.charts import BLUE, FAINT, POINTS
from lib.storage.folder import Folder
from lib.training.metrics import EVENTS, SCHEMA, TrainingProgress, publish_metrics, read_metrics, tensorboard
from lib.training.report import page
from tests.support.charts import charts, curve, paths, texts
from tests.support.messages import listen

VOID = {"meta", "br", "hr", "link", "img"}


def row(step: int, **values: Any) -> dict[str, Any]:
    values_of_step = {
        "step": step,
        "epoch": step / 100,
        "loss": 2.0 / step,
        "lr": 1e-5,
        "gradient_norm": 1.5,
        "tokens": 6420,
    }
    return values_of_step | {"rows": 90, "seconds": 2.0, "dataset": "t2" if step % 3 else "dureader"} | values


def rows(first: int, last: int, **values: Any) -> list[dict[str, Any]]:
    return [row(step, **values) for step in range(first, last + 1)]


def table(steps: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(steps), SCHEMA)


def scored(step: int, value: float) -> dict[str, Any]:
    return {"step": step, "measure": "ndcg_at_10", "ndcg_at_10": value}


def test_the_line_says_where_the_run_is() -> None:
    """Step, loss, learning rate, speed over the last steps, MFU where it is known, and the time left."""
    latest = [*rows(101, 119), row(120, loss=0.4321)]
    expected = "step 120/400  loss 0.4321  lr 1.0e-05  3,210 tokens/s  45 samples/s  "

    for known, mfu in (((None, None), ""), ((6e8, None), ""), ((6e8, 5e12), "MFU 39 %  ")):
        run = TrainingProgress(400, *known)
        assert run.line() == "step 0/400  waiting for the first step"
        run.add(latest)
        assert run.line() == f"{expected}{mfu}ETA 9:20"


def test_rates_are_of_the_last_steps() -> None:
    """Slow first steps leave the window."""
    run = TrainingProgress(100, stream=io.StringIO())
    run.add([row(1, seconds=1000.0), *rows(2, 21)])

    assert "3,210 tokens/s" in run.line()


def test_a_restart_is_reported_once_and_its_steps_count_once() -> None:
    """After a restart the line goes on from the earlier step, with the rates of the steps before it and of the new ones."""
    messages, run = listen(), TrainingProgress(40)
    run.add(rows(1, 20))
    run.add([row(17, seconds=4.0)])
    run.add(rows(18, 21, seconds=4.0))

    assert messages == ["went back to step 16"]
    assert run.line().startswith("step 21/40")
    assert f"{6420 * 20 / (15 * 2 + 5 * 4):,.0f} tokens/s" in run.line()


def test_a_skipped_step_is_reported() -> None:
    """Its row has no speed, and does not enter the line."""
    messages, stream = listen(), io.StringIO()
    run = TrainingProgress(40, stream=stream)
    with run.shown():
        run.add([*rows(1, 3), {"step": 4, "loss": float("nan"), "gradient_norm": 1.0}])

    assert messages == ["step 4 could not be done: loss nan, gradient norm 1.0"]
    assert stream.getvalue().startswith("step 3/40  ")


@pytest.mark.parametrize("live", [False, True])
def test_the_line_is_drawn_during_the_run(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's line is drawn over, a log gets lines; the last one stays."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: live)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    run = TrainingProgress(9, stream=stream)
    with run.shown():
        deadline = time.monotonic() + 30
        while stream.getvalue().count("waiting for the first step") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.fraction() == 0.0
        run.add(rows(1, 9))
    written = stream.getvalue()

    assert written.endswith("ETA 0:00\n")
    assert run.fraction() == 1.0
    assert written.count("waiting for the first step") > 2
    assert (written.count("\r\x1b[2K") > 2) if live else ("\r" not in written and written.count("\n") > 2)


def test_metrics_come_back_in_order_each_step_once(tmp_path: Path) -> None:
    """Files of ranges, one of them repeated: of a step done twice the later row counts, however ranges overlap."""
    folder = Folder(str(tmp_path / "metrics"))
    assert read_metrics(folder).equals(table([]))
    for part in (rows(11, 20), rows(1, 10), rows(21, 25)):
        publish_metrics(folder, table(part))
    again = table(rows(17, 24, loss=9.0))
    publish_metrics(folder, again.select(list(reversed(again.column_names))))
    publish_metrics(folder, table(rows(1, 2, loss=8.0)))  # replaces 1 to 10
    result = read_metrics(folder)

    assert sorted(folder.list()) == [f"metrics-{first:08d}.parquet" for first in (1, 11, 17, 21)]
    assert result.schema.equals(SCHEMA)
    assert result.equals(
        table([*rows(1, 2, loss=8.0), *rows(11, 16), *rows(17, 24, loss=9.0), row(25)]).select(SCHEMA.names)
    )


def events(content: bytes) -> list[Any]:
    """Read the events of a file and check their checksums."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data: bytes) -> int:
        value = crc32c(data)
        return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF

    result, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        data = content[place + 12 : place + 12 + length]
        assert struct.unpack_from("<I", content, place + 8)[0] == masked(content[place : place + 8])
        assert struct.unpack_from("<I", content, place + 12 + length)[0] == masked(data)
        result.append(Event.FromString(data))
        place += 16 + length
    return result


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    """Every scalar of every step under its tag, at the run's own seconds; the same run gives the same bytes."""
    folder = Folder(str(tmp_path / "events"))
    measured = [scored(2, 0.25), scored(4, 0.5)]
    tensorboard(folder, table(rows(1, 4)), [{"step": 1}, *measured])
    first = folder.read(EVENTS)
    read = events(first)
    scalars = {(value.tag, event.step): value.simple_value for event in read for value in event.summary.value}

    assert read[0].file_version == "brain.Event:2"
    assert [event.wall_time for event in read] == [0, 2, 4, 6, 8, 4, 8]
    assert scalars["train/loss", 4] == pytest.approx(0.5)
    assert scalars["train/lr", 1] == pytest.approx(1e-5)
    assert scalars["train/gradient_norm", 3] == pytest.approx(1.5)
    assert scalars["train/tokens_per_second", 2] == pytest.approx(3210)
    assert scalars["eval/ndcg_at_10", 2] == pytest.approx(0.25)
    assert scalars["eval/ndcg_at_10", 4] == pytest.approx(0.5)
    assert len(scalars) == 4 * 4 + 2
    tensorboard(folder, table(rows(1, 4)), measured)
    assert folder.read(EVENTS) == first
    assert list(folder.list()) == [EVENTS]


def test_tensorboard_itself_reads_the_file(tmp_path: Path) -> None:
    """TensorBoard finds the file by its name and shows the run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard(Folder(str(tmp_path)), table(rows(1, 4)), [scored(4, 0.5)])
    read = EventAccumulator(str(tmp_path)).Reload()

    assert [(event.step, event.value) for event in read.Scalars("train/loss")][1] == (2, 1.0)
    assert [event.value for event in read.Scalars("eval/ndcg_at_10")] == [0.5]


class Checker(HTMLParser):
    """Checks that elements close in order; collects the cells of tables and the links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{name}={value}" for name, value in attrs if name in ("href", "src", "xlink:href", "data")]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def a_page(steps: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]] = (), **facts: Any) -> str:
    options = {"learning_rate": 1e-5, "negatives": ("a", "b"), "note": None, "prompt": "<b>&\"'</b>"}
    return page("run <1>", {"model": "tiny & small"} | facts, table(steps), scores, options, {"torch": "2.13"})


def test_the_page_shows_everything_of_a_small_run() -> None:
    """Facts, curves, mean losses by dataset, evaluations with the best one, options, versions; all escaped; no other file."""
    text = a_page(rows(1, 60), [scored(30, 0.6123), scored(60, 0.5999)])
    read = Checker(text)

    assert read.open == []
    assert all("=#" in link for link in read.links)  # parts of the same chart
    assert not re.search(r"https?:|//|url\((?!#)|@import|<script|<link", re.sub(r'xmlns(:xlink)?="[^"]*"', "", text))
    assert "<b>" not in text
    assert "<title>run &lt;1&gt;</title>" in text
    assert ["model", "tiny & small"] in read.cells
    assert ["learning_rate", "1e-05"] in read.cells
    assert ["negatives", "a, b"] in read.cells
    assert ["prompt", "<b>&\"'</b>"] in read.cells
    assert ["note", ""] in read.cells
    assert ["torch", "2.13"] in read.cells
    assert ["step", "ndcg_at_10"] in read.cells
    assert ["30", "0.6123"] in read.cells
    assert ["60", "0.5999"] in read.cells
    assert text.count('<tr class="best">') == 1
    loss, _, _, speed, evaluation = charts(text)
    np.testing.assert_allclose(curve(loss, FAINT), [[step, 2 / step] for step in range(1, 61)], atol=0.02)
    assert len(curve(loss, BLUE)) == 60
    np.testing.assert_allclose(np.ptp(paths(speed, f"stroke: {BLUE}")[0][:, 1]), 0, atol=1e-3)
    np.testing.assert_allclose(curve(evaluation, BLUE), [[30, 0.6123], [60, 0.5999]], atol=0.05)
    assert "best 0.6123 at step 30" in texts(evaluation)
    for name, steps in (("dureader", range(3, 61, 3)), ("t2", [step for step in range(1, 61) if step % 3])):
        losses = [2 / step for step in steps]
        late = losses[-(len(losses) // 10) :]
        counts = [name, str(len(losses)), f"{90 * len(losses):,}", f"{6420 * len(losses):,}"]
        assert [*counts, f"{np.mean(losses):.4f}", f"{np.mean(late):.4f}"] in read.cells


def test_the_page_of_a_run_without_steps_or_with_one() -> None:
    """Nothing to draw, or a single point, is a page too; a loss that is no number is left out and counted."""
    assert "No step was done" in a_page([])
    assert Checker(a_page([row(1)], [scored(1, 0.0)])).open == []
    text = a_page([row(1), row(2, loss=float("nan")), row(3, loss=float("inf")), row(4)], [{"step": 4}])

    assert Checker(text).open == []
    assert "2 steps without a number are left out" in text
    assert "nan" not in text.split("<h2>Loss by dataset")[0]


def test_a_long_run_makes_a_small_page() -> None:
    """100,000 steps are drawn with some thousand points, in well under a megabyte and a few seconds."""
    began, count = time.monotonic(), 100_000
    steps = np.arange(1, count + 1)
    columns = {"step": steps, "epoch": steps / 1e4, "loss": 1 / steps, "lr": 1e-5 * (1 - steps / count)}
    columns |= {"gradient_norm": np.ones(count), "tokens": np.full(count, 4096), "rows": np.full(count, 64)}
    whole = pa.table(columns | {"seconds": np.ones(count), "dataset": ["t2"] * count}).cast(SCHEMA)
    text = page("long", {}, whole, [], {}, {})

    assert len(text) < 300_000
    assert len(charts(text)) == 4
    assert all(len(points) <= POINTS for svg in charts(text) for points in paths(svg, "stroke: "))
    assert time.monotonic() - began < 10


def test_the_driver_loads_neither_torch_nor_ray() -> None:
    """Neither the live line nor the report needs them; a report alone needs matplotlib."""
    program = "import sys, lib.training.metrics, lib.training.report\n"
    program += "print({'torch', 'ray', 'rich', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"

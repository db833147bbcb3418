"""The comparison: every system and task once, published scores and the difference, one page that needs no other file."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lib.cli.charts import BLUE, FAINT, INK
from lib.errors import InputError, RunError
from lib.evaluation.compare import CompareConfig, compare
from lib.evaluation.metrics import NAMES
from lib.evaluation.results import Result, averaged, read_result, write_result
from lib.evaluation.tasks import Task, find
from lib.storage.folder import Folder
from tests.support.charts import bars, charts, paths, texts


def result(system: str, task: str, score: float, **identity) -> tuple[Result, Task, dict]:
    values = {name: np.full(8, score) + np.linspace(-0.1, 0.1, 8) for name in NAMES}
    means, bounds = averaged(values)
    known = find(task) or Task(name=task)
    scores = Result(
        system=system,
        task=task,
        split="dev",
        main_score=known.main_score,
        scores=means,
        intervals=bounds,
        identity={"revision": "r1"} | identity,
        counts={"queries": 8, "passages": 100, "unranked": 0},
        notes=("1 queries are empty; each scores 0 (q<1>)",),
        versions={"torch": "2"},
        seconds={"embed passages": 1.5},
    )
    return scores, known, values


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Two systems, a published one on two tasks and another one on one of them."""
    place = Folder(str(tmp_path))
    for each in (
        result("piccolo", "T2Retrieval", 0.83, model="/models/piccolo-base-zh"),
        result("piccolo", "T2Reranking", 0.60, model="/models/piccolo-base-zh"),
        result("mine & yours", "T2Retrieval", 0.5, model="mine"),
    ):
        write_result(place, each[0], each[1], [f"q{i}" for i in range(8)], each[2])
    return place


def test_every_system_has_its_line_and_what_was_published(folder):
    """Main scores in percent; under a system whose scores a recipe has, those and the difference; an average only where all
    tasks are there."""
    text, _ = compare(CompareConfig(input=folder.url))
    lines = [line for line in folder.read("comparison.md").decode().splitlines() if line.startswith("| ")]

    assert text == f"{folder.url}/comparison.md"
    assert lines == [
        "| system | T2Reranking | T2Retrieval | average |",
        "| mine & yours |  | 50.00 |  |",
        "| piccolo | 60.00 | 83.00 | 71.50 |",
        "| piccolo, published | 66.46 | 82.38 | 74.42 |",
        "| piccolo, difference | -6.46 | +0.62 | -2.92 |",
    ]


def test_the_page_is_whole_and_alone(folder):
    """A bar for every score and published score, as long as the score; the measured ones with their intervals; names escaped;
    every element closed; no script and nothing to fetch."""
    compare(CompareConfig(input=folder.url))
    page = folder.read("comparison.html").decode()
    reranking, retrieval = charts(page)

    assert bars(reranking, BLUE) == pytest.approx([60.0], abs=0.01)
    assert bars(reranking, FAINT) == pytest.approx([66.46], abs=0.01)
    assert bars(retrieval, BLUE) == pytest.approx([83.0, 50.0], abs=0.01)
    assert bars(retrieval, FAINT) == pytest.approx([82.38], abs=0.01)
    assert {"piccolo", "published", "mine & yours"} <= set(texts(retrieval))
    assert {"83.00 (+0.62)", "82.38", "50.00"} <= {text.strip() for text in texts(retrieval)}
    assert len(paths(retrieval, f"stroke: {INK}")) == 2
    assert "mine &amp; yours" in page
    assert not re.search(r"<script|src=|href=\"(?!#)|url\((?!#)|@import", page)
    assert open_elements(page) == []


def open_elements(page: str) -> list[str]:
    """The elements that are not closed, and those that are closed and were not open."""

    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.stack: list[str] = []
            self.wrong: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                self.stack.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if self.stack and self.stack[-1] == tag:
                self.stack.pop()
            else:
                self.wrong.append(tag)

    balance = Balance()
    balance.feed(page)
    return balance.stack + balance.wrong


def test_systems_are_chosen_by_name(folder):
    """--system takes the named ones in that order; an unknown one is refused with the names of all."""
    compare(CompareConfig(input=folder.url, system=("piccolo", "mine & yours")))
    lines = folder.read("comparison.md").decode().splitlines()
    assert [line.split(" |")[0] for line in lines if line.startswith(("| piccolo |", "| mine"))] == [
        "| piccolo",
        "| mine & yours",
    ]
    with pytest.raises(InputError, match=r"no results of 'other'\. Systems there: mine & yours, piccolo"):
        compare(CompareConfig(input=folder.url, system=("other",)))


def test_other_data_under_one_name_is_not_compared(folder):
    """Two systems on two data of the same name are refused, with both; a choice of systems that agree is not."""
    evaluated, task, values = result("other", "T2Retrieval", 0.5, data="1234")
    write_result(folder, evaluated, task, [f"q{i}" for i in range(8)], values)
    with pytest.raises(
        InputError, match=r"both named T2Retrieval \(data '1234' and None\). Choose systems with --system"
    ):
        compare(CompareConfig(input=folder.url))
    compare(CompareConfig(input=folder.url, system=("piccolo",)))


def test_a_file_that_is_no_result_is_refused(folder, tmp_path):
    """So is a folder without results."""
    with pytest.raises(InputError, match="evaluate_model"):
        compare(CompareConfig(input=str(tmp_path / "nothing")))
    folder.publish("results/piccolo/other.json", b"{}")
    with pytest.raises(InputError, match=r"results/piccolo/other\.json is not a result"):
        compare(CompareConfig(input=folder.url))


def test_a_result_is_read_as_it_was_written(folder):
    """Every field comes back; another identity under the same name is refused, another place of the same model is not."""
    evaluated, task, values = result("piccolo", "T2Retrieval", 0.83, model="/elsewhere/piccolo-base-zh")
    again = read_result(folder.read("results/piccolo/T2Retrieval.json"))
    assert again.scores == evaluated.scores
    assert again.intervals == evaluated.intervals
    assert again.notes == evaluated.notes
    write_result(folder, evaluated, task, [f"q{i}" for i in range(8)], values)
    other, task, values = result("piccolo", "T2Retrieval", 0.83, revision="r2")
    with pytest.raises(RunError, match="revision: there 'r1', now 'r2'"):
        write_result(folder, other, task, [f"q{i}" for i in range(8)], values)

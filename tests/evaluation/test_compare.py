"""Results side by side: every system and task once, published scores and the difference, one page that needs no other file."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lib.errors import InputError, RunError
from lib.evaluation.compare import CompareConfig, compare
from lib.evaluation.metrics import NAMES
from lib.evaluation.results import Result, averaged, read_result, write_result
from lib.evaluation.tasks import Task, find
from lib.storage.folder import Folder


def result(system: str, task: str, score: float, **identity) -> tuple[Result, Task, dict]:
    values = {name: np.full(8, score) + np.linspace(-0.1, 0.1, 8) for name in NAMES}
    means, bounds = averaged(values)
    known = find(task) or Task(name=task)
    made = Result(
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
    return made, known, values


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Two systems, one of them published, on two tasks; the other has one of them only."""
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
    """A bar for every score and published score, as long as the score; names escaped; every element closed; no script and
    nothing to fetch."""
    compare(CompareConfig(input=folder.url))
    page = folder.read("comparison.html").decode()
    widths = [float(width) for width in re.findall(r"class=bar style='width:([\d.]+)%'", page)]

    assert sorted(widths) == [50.0, 60.0, 66.46, 82.38, 83.0]
    assert "mine &amp; yours" in page
    assert not re.search(r"<script|src=|href=|url\(|@import", page)
    assert open_elements(page) == ["html"]


def open_elements(page: str) -> list[str]:
    """What is open at the deepest unbalanced point, were any closed that was not open; `html` is closed at the end."""

    class Balance(HTMLParser):
        stack, wrong = [], []

        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                self.stack.append(tag)

        def handle_endtag(self, tag):
            if self.stack[-1] == tag:
                self.stack.pop()
            else:
                self.wrong.append(tag)

    found = Balance()
    found.feed(page.removesuffix("</html>\n"))
    return found.stack + found.wrong


def test_systems_are_chosen_by_name(folder):
    """--system takes those named, in that order, and names those there are when one is not."""
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
    made, task, values = result("other", "T2Retrieval", 0.5, data="1234")
    write_result(folder, made, task, [f"q{i}" for i in range(8)], values)
    with pytest.raises(
        InputError, match=r"both named T2Retrieval \(data '1234' and None\). Choose systems with --system"
    ):
        compare(CompareConfig(input=folder.url))
    compare(CompareConfig(input=folder.url, system=("piccolo",)))


def test_what_is_no_result_is_told(folder, tmp_path):
    """A folder without results, and a file among them that is none."""
    with pytest.raises(InputError, match="evaluate_model"):
        compare(CompareConfig(input=str(tmp_path / "nothing")))
    folder.publish("results/piccolo/other.json", b"{}")
    with pytest.raises(InputError, match=r"results/piccolo/other\.json is not a result"):
        compare(CompareConfig(input=folder.url))


def test_a_result_is_read_as_it_was_written(folder):
    """Every field comes back; another identity under the same name is refused, another place of the same model is not."""
    made, task, values = result("piccolo", "T2Retrieval", 0.83, model="/elsewhere/piccolo-base-zh")
    again = read_result(folder.read("results/piccolo/T2Retrieval.json"))
    assert again.scores == made.scores
    assert again.intervals == made.intervals
    assert again.notes == made.notes
    write_result(folder, made, task, [f"q{i}" for i in range(8)], values)
    other, task, values = result("piccolo", "T2Retrieval", 0.83, revision="r2")
    with pytest.raises(RunError, match="revision: there 'r1', now 'r2'"):
        write_result(folder, other, task, [f"q{i}" for i in range(8)], values)

"""What the documentation promises is there: a page for every recipe, and commands that the jobs understand."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

from lib import recipes
from lib.training import losses
from lib.training.config import FinetuneConfig
from lib.training.data.sources import parse_data, parse_weights

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"^ *(?:ray job submit .*-- )?python (jobs/\w+\.py) (.+)$", re.MULTILINE)
FINETUNE = "jobs/finetune_model.py"
TRAINING = ROOT / "docs" / "training.md"


def command(path: str) -> click.Command:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """The job and the words of each command of a page, but of those that are not whole."""
    found = COMMAND.findall(page.read_text().replace("\\\n", " "))
    return ((job, words) for job, words in found if "..." not in words)


def parsed(job: str, words: str) -> dict:
    return command(job).make_context(job, shlex.split(words, comments=True)).params


def trainings() -> list[tuple[str, str]]:
    """Page and words of each command that trains."""
    pages = [ROOT / "README.md", *PAGES]
    return [(page.name, words) for page in pages for job, words in commands(page) if job == FINETUNE]


def test_every_recipe_has_a_page():
    """docs/models/NAME.md, which says what was verified, and is linked from the README."""
    readme = (ROOT / "README.md").read_text()
    for name in recipes.names():
        page = ROOT / "docs" / "models" / f"{name}.md"
        assert page.exists(), f"write {page}"
        assert "Verified here" in page.read_text()
        assert f"docs/models/{name}.md" in readme


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_command_is_understood(page):
    """Each `python jobs/...` line of a page parses, with the job's own parser, to the options that there are."""
    for job, words in commands(page):
        try:
            parsed(job, words)
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {job} {words}: {error.format_message()}")


def test_every_recipe_of_a_page_is_one():
    """--recipe NAME, or --reranker-recipe NAME, in a page names a recipe that its job takes."""
    for page in PAGES:
        for job, words in commands(page):
            names = re.findall(r"--recipe (\S+)", words)
            kind = recipes.RerankRecipe if "rerank" in job else recipes.Recipe
            known = recipes.stages() if job == FINETUNE else recipes.names(kind)
            rerankers = re.findall(r"--reranker-recipe (\S+)", words)
            assert not set(names) - set(known), f"{page.name}: {job} {words}"
            assert not set(rerankers) - set(recipes.names(recipes.RerankRecipe)), f"{page.name}: {job} {words}"


@pytest.mark.parametrize(("page", "words"), trainings())
def test_every_training_command_can_be_meant(page, words):
    """Its losses, data, weights, recipe and dimensions are such, and datasets that it names are among its data."""
    config = FinetuneConfig(**parsed(FINETUNE, words))
    stage = recipes.stage(config.recipe)[1] if config.recipe else None
    data = parse_data(config.data)
    of = {losses.parse(config.loss or (stage.loss if stage else ("infonce",))).of}
    for word in config.dataset_loss:
        name, _, loss = word.partition("=")
        of.add(losses.parse((loss,)).of)
        assert name in data
    named = {word.partition("=")[0] for word in (stage.dataset_loss if stage else ())}

    assert len(of) == 1
    assert set(parse_weights(config.weight)) <= set(data)
    assert named <= set(data), f"{page}: {config.recipe} has losses of datasets named {', '.join(named)}"
    assert all(int(dim) > 0 for dim in config.matryoshka)


@pytest.mark.parametrize("stage", recipes.stages())
def test_every_training_recipe_is_documented(stage):
    """A row in docs/training.md with a link to the system's page, which has its command."""
    page = f"{recipes.stages()[stage]}.md"
    row = next((line for line in TRAINING.read_text().splitlines() if line.startswith(f"| `{stage}` ")), "")

    assert f"models/{page}" in row
    assert any(name == page and f"--recipe {stage} " in words for name, words in trainings())


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_is_documented(name):
    """A row in docs/training.md with each of its parameters and their defaults, but the weight, which all have."""
    row = next((line for line in TRAINING.read_text().splitlines() if line.startswith(f"| `{name}` ")), "")
    loss = losses.parse((name,))
    values = {each.name: getattr(loss, each.name) for each in fields(loss) if each.name != "weight"}

    assert row, f"write a row for {name} in {TRAINING}"
    for parameter, value in values.items():
        assert (f"`{parameter}` (none)" if value is None else f"`{parameter}={value:g}`") in row

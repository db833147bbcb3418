"""What the documentation promises is there: a page for every recipe, and commands that the jobs understand."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from lib import recipes

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"^ *(?:ray job submit .*-- )?python (jobs/\w+\.py) (.+)$", re.MULTILINE)


def command(path: str) -> click.Command:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


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
    for job, words in COMMAND.findall(page.read_text().replace("\\\n", " ")):
        if "..." in words:
            continue
        try:
            command(job).make_context(job, shlex.split(words, comments=True))
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {job} {words}: {error.format_message()}")


def test_every_recipe_of_a_page_is_one():
    """--recipe NAME, or --reranker-recipe NAME, in a page names a recipe that its job takes."""
    for page in PAGES:
        for job, words in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            names = re.findall(r"--recipe (\S+)", words)
            kind = recipes.RerankRecipe if "rerank" in job else recipes.Recipe
            rerankers = re.findall(r"--reranker-recipe (\S+)", words)
            assert not set(names) - set(recipes.names(kind)), f"{page.name}: {job} {words}"
            assert not set(rerankers) - set(recipes.names(recipes.RerankRecipe)), f"{page.name}: {job} {words}"

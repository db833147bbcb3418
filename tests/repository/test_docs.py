"""The pages keep their promises: links and paths exist, commands parse, option tables are the code's, the README is short."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
import yaml

from lib import recipes
from lib.training import losses
from lib.training.data.sources import parse_data, parse_weights

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ALL_PAGES = [README, ROOT / "CONTRIBUTING.md", *PAGES, ROOT / "examples" / "README.md", ROOT / "cluster" / "README.md"]
FINETUNE_PAGE = ROOT / "docs" / "finetune.md"
FINETUNE, SUBMIT = "jobs/finetune_model.py", "jobs/submit_job.py"
COMMAND = re.compile(r"python (jobs/\w+\.py) ([^`\n]+)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)")
PATH = re.compile(r"\b(?:lib|jobs|tests|docs|examples|benchmarks|cluster)/[\w./-]*\w")
TREE_LINES = 20  # of the README; house of one evening
PROSE_WIDTH = 150  # characters; tables and commands may be wider


def command(path: str) -> click.Command:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """The job and the words of each command of a page, submitted ones too, except those that are shortened by `...`."""
    for job, words in COMMAND.findall(page.read_text().replace("\\\n", " ")):
        for each in [(job, words), *COMMAND.findall(words)]:
            if "..." not in each[1]:
                yield each


def parsed(job: str, words: str) -> dict:
    return command(job).make_context(job, shlex.split(words.rstrip("& "), comments=True)).params


def trainings() -> list[tuple[str, str]]:
    """Page and words of each command that trains."""
    pages = [README, *PAGES]
    return [(page.name, words) for page in pages for job, words in commands(page) if job == FINETUNE]


def anchors(page: Path) -> set[str]:
    """The fragments that a Markdown page's headings make."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", ALL_PAGES, ids=identity)
def test_every_link_leads_somewhere(page):
    """A link's file exists, and its fragment is a heading of that page."""
    for target, fragment in LINK.findall(page.read_text()):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{identity(page)}: {target}"
        if fragment:
            assert fragment in anchors(place), f"{identity(page)}: {target}{fragment}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=identity)
def test_every_path_exists(page):
    """A file or folder of the project that a page names is there; names in capitals (NAME.py) stand for any."""
    text = re.sub(r"\]\([^)]*\)|\b\w+://\S+", "", page.read_text())  # links are tested above; URLs are no paths
    for name in set(PATH.findall(text)):
        if not re.search(r"[A-Z]{3}|verb_noun", name):
            assert (ROOT / name).exists(), f"{identity(page)} names {name}"


def test_every_recipe_has_a_page():
    """docs/models/NAME.md, which says what was verified, and is in the table of docs/models/README.md."""
    listed = (ROOT / "docs" / "models" / "README.md").read_text()
    for name in recipes.names():
        page = ROOT / "docs" / "models" / f"{name}.md"
        assert page.exists(), f"write {page}"
        assert "Verified here" in page.read_text()
        assert f"({name}.md)" in listed


@pytest.mark.parametrize("page", ALL_PAGES, ids=identity)
def test_every_command_is_understood(page):
    """Each `python jobs/...` of a page parses, with the job's own parser, to the options that there are."""
    for job, words in commands(page):
        try:
            parsed(job, words)
        except click.ClickException as error:
            pytest.fail(f"{identity(page)}: {job} {words}: {error.format_message()}")


def test_every_job_has_its_command_in_the_readme():
    """The table of jobs, and the links from it to pages, cover every job but the conversion."""
    text = README.read_text()
    for job in (ROOT / "jobs").glob("*.py"):
        assert f"python jobs/{job.name} " in text or job.stem == "convert_reranker"


def test_every_recipe_of_a_page_is_one():
    """--recipe NAME, or --reranker-recipe NAME, in a page names a recipe that its job takes."""
    for page in [README, *PAGES]:
        for job, words in commands(page):
            names = re.findall(r"--recipe (\S+)", words)
            kind = recipes.RerankRecipe if "rerank" in job else recipes.Recipe
            known = recipes.stages() if job == FINETUNE else recipes.names(kind)
            rerankers = re.findall(r"--reranker-recipe (\S+)", words)
            assert job == SUBMIT or not set(names) - set(known), f"{page.name}: {job} {words}"
            assert not set(rerankers) - set(recipes.names(recipes.RerankRecipe)), f"{page.name}: {job} {words}"


@pytest.mark.parametrize(("page", "words"), trainings())
def test_every_training_command_can_be_meant(page, words):
    """Its losses, data, weights, recipe and dimensions are such, and datasets that it names are among its data."""
    options = parsed(FINETUNE, words)
    stage = recipes.stage(options["recipe"])[1] if options["recipe"] else None
    data = parse_data(options["data"])
    kinds = {losses.parse(options["loss"] or (stage.loss if stage else ("infonce",))).kind}
    for word in options["dataset_loss"]:
        name, _, loss = word.partition("=")
        kinds.add(losses.parse((loss,)).kind)
        assert name in data
    named = {word.partition("=")[0] for word in (stage.dataset_loss if stage else ())}

    assert len(kinds) == 1
    assert set(parse_weights(options["weight"])) <= set(data)
    assert named <= set(data), f"{page}: {options['recipe']} has losses of datasets named {', '.join(named)}"
    assert all(int(dim) > 0 for dim in options["matryoshka"])


@pytest.mark.parametrize("stage", recipes.stages())
def test_every_training_recipe_is_documented(stage):
    """A row in docs/finetune.md with a link to the system's page, which has its command."""
    page = f"{recipes.stages()[stage]}.md"
    row = next((line for line in FINETUNE_PAGE.read_text().splitlines() if line.startswith(f"| `{stage}` ")), "")

    assert f"models/{page}" in row
    assert any(name == page and f"--recipe {stage} " in words for name, words in trainings())


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_is_documented(name):
    """A row in docs/finetune.md with each of its parameters and their defaults, but the weight, which all have."""
    row = next((line for line in FINETUNE_PAGE.read_text().splitlines() if line.startswith(f"| `{name}` ")), "")
    loss = losses.parse((name,))
    values = {each.name: getattr(loss, each.name) for each in fields(loss) if each.name != "weight"}

    assert row, f"write a row for {name} in {FINETUNE_PAGE}"
    for parameter, value in values.items():
        assert (f"`{parameter}` (none)" if value is None else f"`{parameter}={value:g}`") in row


def test_option_tables_are_those_of_the_code():
    """Every job has a table of its options in docs/, and `make docs` would change none of them."""
    program = [sys.executable, str(ROOT / "docs" / "options.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    tables = {job for page in PAGES for job in re.findall(r"<!-- options: (\S+) -->", page.read_text())}

    assert done.returncode == 0, done.stdout + done.stderr
    assert tables == {f"jobs/{job.name}" for job in (ROOT / "jobs").glob("*.py")}


def test_the_readme_is_short():
    """At most 150 lines of at most 120 characters, a tree of at most TREE_LINES lines."""
    lines = README.read_text().splitlines()
    tree = README.read_text().split("## The tree")[1].split("```")[1].strip().splitlines()

    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []
    assert len(tree) <= TREE_LINES


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=identity)
def test_prose_is_not_wide(page):
    """Lines that are neither of a table nor a command have at most PROSE_WIDTH characters."""
    wide = [line for line in page.read_text().splitlines() if len(line) > PROSE_WIDTH]
    assert [
        line for line in wide if not line.startswith("|") and "python jobs/" not in line and "hf download" not in line
    ] == []


def test_every_package_is_in_the_readme():
    """The tree of the README names each package of lib/."""
    tree = README.read_text().split("## The tree")[1].split("```")[1]
    packages = [path.name for path in (ROOT / "lib").iterdir() if (path / "__init__.py").exists()]

    assert [name for name in packages if f"lib/{name}/" not in tree] == []


def test_workflows_run_what_developers_run():
    """CI calls .ci/run, and the nightly jobs targets of the Makefile; hooks name programs of .venv and files of the tree."""
    ci, nightly = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text()) for name in ("ci", "nightly")
    )
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]

    assert [step.get("run") for step in ci["jobs"]["test"]["steps"]][-1] == ".ci/run"
    assert set(nightly["jobs"]["long"]["strategy"]["matrix"]["target"]) <= set(targets)
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks[0]["hooks"])


def test_the_licence_is_told_everywhere():
    """LICENSE, pyproject.toml and CITATION.cff name Apache-2.0, and the version of the citation is the project's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())

    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert project["version"] == citation["version"]
    assert all((ROOT / name).exists() for name in project["license-files"])

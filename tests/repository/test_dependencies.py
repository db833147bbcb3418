"""Dependencies: every import has a declared one, and the versions that the code relies on are the pinned ones."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lib.index.kinds.ivf_rabitq import TESTED_FAISS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
# Packages of extras, which need not be installed for the tests.
OPTIONAL = {"lance": "pylance", "mteb": "mteb"}
# Modules that users of an extra import themselves; nothing in lib does.
MODULES_OF_EXTRAS = {"lib/evaluation/mteb_adapter.py": "mteb"}
INSTALLED = packages_distributions()
MODULES = sorted([*(ROOT / "lib").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(each).name) for each in requirements}


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {name: names(requirements) for name, requirements in PROJECT["optional-dependencies"].items()}
OF_USERS = set().union(*(each for name, each in EXTRAS.items() if name != "dev"))


def third_party(path: Path) -> tuple[set[str], set[str]]:
    """Top-level packages that a file imports when it is loaded, and those that its functions import."""
    tree = ast.parse(path.read_text())
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    imports: tuple[set[str], set[str]] = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            continue
        tops = {module.split(".")[0] for module in modules}
        imports[node in lazy].update(tops - set(sys.stdlib_module_names) - {"lib"})
    return imports


def distributions(package: str) -> set[str]:
    """The distributions that bring a package, by the names that pyproject.toml uses."""
    return {canonicalize_name(each) for each in INSTALLED.get(package) or [OPTIONAL.get(package, package)]}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_belongs_to_a_declared_dependency(path):
    """What a module loads at once is a dependency; what a function loads may also belong to an extra, though not to `dev`."""
    eager, lazy = third_party(path)
    allowed = REQUIRED | EXTRAS.get(MODULES_OF_EXTRAS.get(str(path.relative_to(ROOT)), ""), set())
    missing = [package for package in eager if not distributions(package) & allowed]
    missing += [package for package in lazy if not distributions(package) & (REQUIRED | OF_USERS)]

    assert missing == [], "declare their distributions in pyproject.toml"


def test_modules_of_extras_are_imported_by_no_other():
    """An installation without the extra works: no module of lib or jobs loads such a module."""
    stems = {Path(path).stem for path in MODULES_OF_EXTRAS}
    importers = [
        str(path)
        for path in MODULES
        if any(re.search(rf"import .*\b{stem}\b|\b{stem} import", path.read_text()) for stem in stems)
    ]

    assert importers == []


def test_imports_are_seen():
    """The packages without which nothing works are among the imports that the test above looks at."""
    eager, lazy = map(set.union, *(map(third_party, MODULES)))

    assert {"numpy", "pyarrow", "click"} <= eager
    assert {"faiss", "torch", "ray", "tensorboardX", "lance"} <= lazy


def test_faiss_has_an_upper_bound():
    """RaBitQ codes are written in faiss's internal layout: a new minor version is not taken before it was tried."""
    (faiss,) = (Requirement(each) for each in PROJECT["dependencies"] if each.startswith("faiss-cpu"))
    major, minor = map(int, re.match(r"(\d+)\.(\d+)", TESTED_FAISS).groups())

    assert PINNED["faiss-cpu"] == TESTED_FAISS
    assert TESTED_FAISS in faiss.specifier
    assert f"{major}.{minor + 1}.0" not in faiss.specifier
    assert f"{major + 1}.0.0" not in faiss.specifier


def test_pinned_versions_are_allowed():
    """constraints.txt holds a version of every dependency, within its declared range."""
    for each in map(Requirement, PROJECT["dependencies"]):
        pinned = {canonicalize_name(name): version for name, version in PINNED.items()}
        assert pinned[canonicalize_name(each.name)] in each.specifier, each

"""The architecture as a test: packages import from floors below their own, never from above or beside."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIB = ROOT / "lib"

FLOORS = [
    ["errors"],
    ["cli"],
    ["storage", "recipes"],
    ["data", "models"],
    ["engine"],
    ["embedding", "reranking"],
    ["index"],
    ["evaluation"],
    ["curation"],
    ["training"],
]
# Inside a package a module imports what it likes as long as there is no circle; its own packages have floors again.
ROOMS = {
    "index": [["kinds"], ["exact"], ["build"], ["estimate", "export", "search"]],
    "training": [["losses"], ["step", "data"], ["models"]],
}
# Decides a run, or answers a wrong command: loads neither torch, transformers nor ray.
LIGHT = [
    *("cli.options", "cli.progress", "storage.folder", "data.corpus", "data.shards", "data.texts", "data.vectors"),
    *("recipes", "models.spec", "models.packing", "engine.run", "index.kinds", "index.build.config"),
    *("evaluation.config", "evaluation.metrics", "evaluation.tasks", "training.config", "training.losses"),
    *("training.data.job", "training.metrics", "training.report"),
]


def name_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(LIB).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {name_of(path): path for path in sorted(LIB.rglob("*.py")) if name_of(path)}


def imports(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Modules of lib that this one imports, anywhere in its text."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module[:-1]
    targets: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(node.module.split(".") if node.module else ())
            targets |= {(*base, alias.name) if (*base, alias.name) in MODULES else base for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "lib", f"{path}: import it relatively"
    return targets - {(), module}


def floor_of(name: str, floors: list[list[str]]) -> int | None:
    return next((number for number, floor in enumerate(floors) if name in floor), None)


def climbs(importer: str, imported: str, floors: list[list[str]]) -> bool:
    """Whether an import goes up or sideways. A module beside the packages with floors stands above all of them."""
    source, target = floor_of(importer, floors), floor_of(imported, floors)
    if importer == imported or source is None:
        return False
    return target is None or target >= source


@pytest.mark.parametrize("module", MODULES, ids=".".join)
def test_imports_go_down(module):
    """A package of lib imports only from floors below its own; so does a room of a package that has floors."""
    assert floor_of(module[0], FLOORS) is not None, f"lib/{module[0]} stands on no floor: add it to FLOORS"
    wrong = [".".join(target) for target in imports(module) if climbs(module[0], target[0], FLOORS)]
    if (rooms := ROOMS.get(module[0])) and len(module) > 1:
        own = [target for target in imports(module) if target[0] == module[0] and len(target) > 1]
        wrong += [".".join(target) for target in own if climbs(module[1], target[1], rooms)]

    assert not wrong, f"lib.{'.'.join(module)} imports {wrong} from its own floor or above"


def test_no_import_circle():
    """No module of lib imports itself by way of others."""
    graph = {module: {target for target in imports(module) if target in MODULES} for module in MODULES}

    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_at_most_thirteen_packages():
    """The top of lib is read at a glance, and every package says in its docstring what is in it."""
    entries = [path for path in LIB.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    silent = [
        name
        for name, path in MODULES.items()
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]

    assert len(entries) <= 13
    assert not silent


def test_light_modules_load_neither_torch_nor_ray():
    """What the driver needs to answer a wrong command loads neither torch, transformers nor ray."""
    program = "import sys\n" + "".join(f"import lib.{name}\n" for name in LIGHT)
    program += "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert done.stdout.strip() == "[]"


def test_files_are_short():
    """No file of lib or jobs is over 300 lines: one idea a file. Half of them are under 110."""
    lengths = sorted(
        (len(path.read_text().splitlines()), path.name)
        for path in [*MODULES.values(), *(ROOT / "jobs").glob("*.py")]
        if path.name != "__init__.py"
    )

    assert lengths[-1][0] <= 300, lengths[-5:]
    assert lengths[len(lengths) // 2][0] <= 110

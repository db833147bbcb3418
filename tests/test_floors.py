"""The architecture as a test: imports go down, never up and never sideways."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from floors below its own; `models.x` stands for a file of a folder, `models.*`
# for its other files, and a folder's files may import their own __init__ when that is below them.
FLOORS = [
    ["errors", "tasks", "training", "building"],
    [
        "options",
        "patience",
        "packing",
        "texts",
        "vectors",
        "progress",
        "recipes",
        "ranking",
        "scratch",
        "heap",
        "ids",
        "tasks.*",
        "losses.tiles",
        "training.collectives",
        "training.optimizer",
        "training.page",
        "training.checkpoint",
        "building.curve",
        "building.log",
        "building.sizes",
    ],
    [
        "atomic",
        "branching",
        "metrics",
        "nearest",
        "losses",
        "indexes",
        "training.lists",
        "training.parallel",
        "building.computing",
    ],
    [
        "storage",
        "models.attention",
        "recipes.*",
        "losses.infonce",
        "losses.kl",
        "losses.bce",
        "indexes.ivf_pq",
    ],
    ["trees", "lease", "losses.margin_mse", "losses.ranknet", "indexes.*"],
    ["models.directory"],
    ["models.modules"],
    ["listing", "models", "cluster", "workers", "losses.*", "training.order", "training.tables"],
    ["formats", "training.trainee", "models.masking", "training.rehearsal"],
    ["formats._lines", "formats.parquet"],
    ["formats.*", "models.forward", "models.pooling", "models.load", "models.precut"],
    [
        "corpus",
        "layouts",
        "models.selftest",
        "models.tokenizer",
        "models.heads",
        "models.m3",
        "training.chunks",
        "training.export",
        "building.centroids",
    ],
    [
        "plan",
        "parts",
        "models.pairs",
        "building.coding",
        "building.kmeans",
        "training.networks",
        "training.step",
        "models.retromae",
    ],
    ["record", "training.watch", "training.embedder", "training.pretraining"],
    [
        "ledger",
        "rows",
        "results",
        "models.encoder",
        "models.rerank_spec",
        "encoding",
        "training.unified",
    ],
    ["stages", "dataset", "compare", "models.reranker", "models.convert", "models.remote_scores", "scoring", "shuffle"],
    ["crew"],
    ["shift"],
    [
        "sharded",
        "dealing",
        "searching",
        "oddities",
        "building.reading",
        "training.reranker",
        "training.pairs",
        "training.loop",
    ],
    [
        "job",
        "report",
        "evaluating",
        "training.launch",
        "training.batches",
        "finetuning",
        "lists",
        "building.train",
        "building.assemble",
    ],
    [
        "embedding",
        "reranking",
        "estimate",
        "retrieval",
        "training.entries",
        "training.ordering",
        "building.source",
        "building.choose",
    ],
    [
        "embed",
        "candidates",
        "convert",
        "training.counts",
        "indexing",
        "building.sample",
        "building.encode",
        "building.exporting",
        "building.measure",
    ],
    ["rerank", "training.plan", "building.training", "building.costs", "finding"],
    ["rankings", "card", "building.growing", "building.reckoning", "building.queries"],
    ["evaluate", "mteb_adapter", "building.recall", "building.expected", "building.exports", "building.card", "asking"],
    ["allowing"],
    ["legs", "search", "building.forecast"],
    ["finetune", "submit", "index"],
]
LIGHT = [
    "errors",
    "options",
    "storage",
    "corpus",
    "plan",
    "ledger",
    "packing",
    "texts",
    "vectors",
    "models",
    "recipes",
    "progress",
    "metrics",
    "tasks",
    "evaluating",
    "finetuning",
    "losses",
    "indexes",
    "indexing",
    "training.plan",
    "training.watch",
    "training.page",
]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "lib").rglob("*.py")):
        parts = [part for part in path.relative_to(ROOT / "lib").with_suffix("").parts if part != "__init__"]
        if parts:
            found[".".join(parts)] = path
    return found


def floor_of(module: str) -> int:
    for names in (module, module.split(".")[0] + ".*"):
        for number, floor in enumerate(FLOORS):
            if names in floor:
                return number
    pytest.fail(f"lib/{module.replace('.', '/')}.py stands on no floor: add it to FLOORS")


def imports(module: str, path: Path) -> set[str]:
    """Modules of lib that this one imports, anywhere in its text."""
    package = ["lib", *module.split(".")] if path.name == "__init__.py" else ["lib", *module.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            candidates = [f"{target}.{alias.name}" for alias in node.names]
            found |= {name if name.removeprefix("lib.") in modules() else target for name in candidates}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("lib.") for name in found if name.startswith("lib.")}


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module):
    """A module of lib imports only from floors below its own."""
    wrong = [name for name in imports(module, modules()[module]) if floor_of(name) >= floor_of(module)]

    assert not wrong, f"lib.{module} (floor {floor_of(module)}) imports {wrong} from its own floor or above"


def test_light_modules_load_neither_torch_nor_ray():
    """What the driver needs to answer a wrong command loads neither torch, transformers nor ray."""
    program = "import sys\n" + "".join(f"import lib.{name}\n" for name in LIGHT)
    program += "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)

    assert done.stdout.strip() == "[]"


def test_files_are_short():
    """No file of lib or jobs is over 300 lines: one idea a file."""
    long = {
        p.name: n
        for p in [*modules().values(), *(ROOT / "jobs").glob("*.py")]
        if (n := len(p.read_text().splitlines())) > 300
    }

    assert not long

"""The model card of a fine-tuned model: its base, data, losses, numbers and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import recipes
from .config import FinetunePlan
from .losses import RERANKING
from .train_run import TrainRun

USE = """```python
from sentence_transformers import {kind}

model = {kind}("this folder")
{call}
```"""
SEGMENTS = """Pairs are put to it by a template, which `python jobs/rerank_pairs.py --model DIR` follows; a language model needs
the `--recipe` that {recipe} is a stage of besides."""
CALLS = {
    "SentenceTransformer": 'vectors = model.encode(["a text"], prompt_name="query")',
    "CrossEncoder": 'scores = model.predict([("a query", "a passage")])',
}


def write_card(
    folder: Path,
    run: TrainRun,
    facts: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Write README.md into a model directory."""
    plan, recipe = run.plan, run.config.recipe
    kind, task = "SentenceTransformer", "sentence-similarity"
    if plan.kind == RERANKING:
        kind, task = "CrossEncoder", "text-ranking"
    in_segments = plan.reranker is not None and bool(plan.reranker.segments)
    datasets = [(name, f"{each.rows:,}", f"{each.batches:,}") for name, each in run.data.counts.datasets.items()]
    sections = [
        f"---\nlibrary_name: sentence-transformers\npipeline_tag: {task}\nbase_model: {plan.spec.name}\n---",
        f"# {plan.spec.name}, fine-tuned with Shoal",
        SEGMENTS.format(recipe=recipe) if in_segments else USE.format(kind=kind, call=CALLS[kind]),
        _about(plan),
        "## Data\n\n" + _table(("dataset", "rows", "batches"), datasets),
        "## Training\n\n" + _table(("", ""), [*facts.items(), *_numbers(plan)]),
    ]
    if measured := [row for row in scores if "measure" in row]:
        rows = [(row["step"], f"{row[row['measure']]:.4f}") for row in measured]
        where = f"Held-out queries of `{run.config.evaluation.evaluate_on}`."
        sections.append(f"## Scores\n\n{where}\n\n" + _table(("step", measured[0]["measure"]), rows))
    sections.append("## Versions\n\n" + _table(("", ""), list(versions.items())))
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", "utf-8")


def _about(plan: FinetunePlan) -> str:
    spec, stage = plan.spec, plan.stage
    if plan.kind == RERANKING:
        return f"Scores pairs of at most {plan.tokens[1]} tokens."
    parts = [f"Vectors of {spec.dim} dimensions, pooled by {' + '.join(spec.pooling)}"]
    parts.append("normalised" if spec.normalize else "not normalised")
    if stage.matryoshka:
        parts.append(f"trained for their first {', '.join(map(str, stage.matryoshka))} dimensions (Matryoshka)")
    query, passage = plan.prompts
    return f"{', '.join(parts)}. Before queries: `{query}`; before passages: `{passage}`."


def _numbers(plan: FinetunePlan) -> list[tuple[str, Any]]:
    """Every number of the stage; those that no source gives are marked."""
    stage = plan.stage
    numbers = [(each.name, getattr(stage, each.name)) for each in fields(stage)]
    kept = [(name, value) for name, value in numbers if value not in (None, (), "") and name not in ("note", "chosen")]
    published = recipes.stage(stage.name)[1] if stage.name else None
    ours = {name for name, value in kept if name in stage.chosen and value == getattr(published, name, None)}
    return [(f"{name} (our choice)" if name in ours else name, value) for name, value in kept]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

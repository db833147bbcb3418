"""The model card of a fine-tuned model: what it is, from what, by which data and losses, and what it scores."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import recipes
from .config import FinetuneConfig, FinetunePlan
from .data.job import Planned
from .losses import RERANKING

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
    config: FinetuneConfig,
    choice: FinetunePlan,
    facts: Mapping[str, Any],
    planned: Planned,
    scores: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Write README.md into a model directory."""
    kind = "CrossEncoder" if choice.of == RERANKING else "SentenceTransformer"
    in_segments = choice.reranker is not None and bool(choice.reranker.segments)
    measured = [row for row in scores if "measure" in row]
    sections = [
        f"---\nlibrary_name: sentence-transformers\npipeline_tag: {_task(kind)}\nbase_model: {choice.spec.name}\n---",
        f"# {choice.spec.name}, fine-tuned with Shoal",
        SEGMENTS.format(recipe=config.recipe) if in_segments else USE.format(kind=kind, call=CALLS[kind]),
        _about(choice),
        "## Data\n\n" + _table(("dataset", "rows", "batches"), _datasets(planned)),
        "## Training\n\n" + _table(("", ""), [*facts.items(), *_numbers(choice)]),
    ]
    if measured:
        rows = [(row["step"], f"{row[row['measure']]:.4f}") for row in measured]
        where = f"Held-out queries of `{config.evaluate_on}`."
        sections.append(f"## Scores\n\n{where}\n\n" + _table(("step", measured[0]["measure"]), rows))
    sections.append("## Versions\n\n" + _table(("", ""), list(versions.items())))
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", "utf-8")


def _task(kind: str) -> str:
    return "text-ranking" if kind == "CrossEncoder" else "sentence-similarity"


def _about(choice: FinetunePlan) -> str:
    spec, stage = choice.spec, choice.stage
    if choice.of == RERANKING:
        return f"Scores pairs of at most {choice.tokens[1]} tokens."
    said = [f"Vectors of {spec.dim} dimensions, pooled by {' + '.join(spec.pooling)}"]
    said.append("normalised" if spec.normalize else "not normalised")
    if stage.matryoshka:
        said.append(f"trained for their first {', '.join(map(str, stage.matryoshka))} dimensions (Matryoshka)")
    query, passage = choice.prompts
    return f"{', '.join(said)}. Before queries: `{query}`; before passages: `{passage}`."


def _datasets(planned: Planned) -> list[tuple[Any, ...]]:
    return [(name, f"{each.rows:,}", f"{each.batches:,}") for name, each in planned.counts.datasets.items()]


def _numbers(choice: FinetunePlan) -> list[tuple[str, Any]]:
    """Every number of the stage; those that no source gives are marked."""
    stage = choice.stage
    said = [(each.name, getattr(stage, each.name)) for each in fields(stage)]
    kept = [(name, value) for name, value in said if value not in (None, (), "") and name not in ("note", "chosen")]
    published = recipes.stage(stage.name)[1] if stage.name else None
    ours = {name for name, value in kept if name in stage.chosen and value == getattr(published, name, None)}
    return [(f"{name} (our choice)" if name in ours else name, value) for name, value in kept]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

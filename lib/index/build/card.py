"""The index card: what the index is, of which vectors, and what it was seen to find. JSON for programs, Markdown for people."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from ...cli.charts import COLOURS, Curve, Note, line_chart
from ...cli.units import format_bytes
from ...engine.parts import Part, read_manifest
from ...engine.stage_log import StageLog
from ..kinds import to_spec, uses_inner_product
from .config import IndexBuild
from .kmeans import ITERATIONS
from .layout import CARD
from .recall import CUTS, Measured, enough
from .segments_job import Manifest, lists_in, pieces_of
from .stage_parts import facts_of

README, CURVE = "README.md", "curve.svg"
DRIFTED = 1.25  # times the training sample's error: its centroids no longer lie where the new vectors do
FULL = 8  # times the vectors that the lists were chosen for: they have become long

METRICS = {
    "cosine": "cosine: lengths were made 1, make the queries' so too; where there are lists faiss gives d, the squared distance, and "
    "the cosine is 1 - d / 2",
    "ip": "inner product, lengths as they came",
    "l2": "squared distance, lengths as they came",
}
USE = """```python
from glob import glob

import faiss  # no Shoal needed
import numpy as np

pieces = [faiss.read_index(path, {flags}) for path in sorted(glob("{files}"))]
{effort}found = [piece.search(queries, 10) for piece in pieces]  # float32 [n, {dim}]
scores, numbers = (np.concatenate(each, axis=1) for each in zip(*found))
best = np.argsort({sign}scores, axis=1)[:, :10]
numbers = np.take_along_axis(numbers, best, axis=1)  # row `number` of rows/, its files in order, has the id
```"""
EFFORT = """for piece in pieces:
    faiss.ParameterSpace().set_index_parameter(piece, "{name}", {value})
"""
SIGN = {"products": "-", "distances": ""}
MAPPED = "pieces/*.faiss", "faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY"
MERGED_ONES = "merged/*.faiss", "faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR"  # their .ivfdata beside them


def write_card(
    build: IndexBuild,
    manifest: Manifest,
    parts: Sequence[Part],
    rows: Sequence[Measured],
    queries: int,
    stages: StageLog,
) -> dict[str, Any]:
    """Write CARD, README and CURVE; the card."""
    config, pieces = build.config, pieces_of(manifest)
    vectors = sum(piece["vectors"] for piece in pieces)
    size = sum(piece["bytes"] for piece in pieces)
    advised = enough(rows, config.recall)
    card = {
        "kind": to_spec(build.kind),
        "why": list(build.choice.why),
        "lists": lists_in(build),
        "metric": config.metric,
        "dim": build.vectors.dim,
        "made": dict(build.vectors.made),
        "input": config.input,
        "rows": sum(part.rows for part in parts),
        "vectors": vectors,
        "without_vector": sum(part.errors for part in parts),
        "pieces": len(pieces),
        "merged": [merged["name"] for merged in manifest["merged"]],
        "bytes": size,
        "bytes_per_vector": size / max(vectors, 1),
        "sample": _sample(build),
        "ranks_by": "products" if uses_inner_product(build.kind, config.metric) else "distances",
        "effort": build.kind.search_parameter,
        "advised": advised.effort,
        "recall": [_recall(row) for row in rows],
        "queries": {"count": queries, "from": config.queries or "vectors held out of the training sample"},
        "drift": drift(build, manifest),
        "seconds": _seconds(build, stages),
        "notes": [*stages.notes, *_fewer(build), *_advice(rows, config.recall)],
        "versions": {name: version(name) for name in ("faiss-cpu", "numpy", "pyarrow", "ray")},
    }
    build.folder.publish(CURVE, recall_chart(card["recall"], build.kind.search_parameter).encode())
    build.folder.publish(README, markdown(card).encode())
    build.folder.publish(CARD, json.dumps(card, indent=1).encode())
    build.folder.sweep(done={CURVE, README, CARD})
    return card


def _recall(row: Measured) -> dict[str, Any]:
    found = {f"recall@{cut}": [round(value, 5) for value in row.recall[cut]] for cut in CUTS}
    return {"effort": row.effort, "core_ms": row.seconds * 1000} | found


def recall_chart(rows: Sequence[Mapping[str, Any]], parameter: str) -> str:
    """Draw recall over the time of a query (rows: a card's `recall`), with the search parameter's value at each point."""
    times = np.array([max(row["core_ms"], 1e-6) for row in rows])  # a logarithm has no zero
    recall = {f"recall@{cut}": np.array([row[f"recall@{cut}"][0] for row in rows]) for cut in CUTS}
    curves = [
        Curve(times, values, name, colour, dots=True)
        for (name, values), colour in zip(recall.items(), COLOURS, strict=True)
    ]
    points = zip(rows, times, recall["recall@10"], strict=True)
    notes = [Note(time, value, str(row["effort"])) for row, time, value in points if parameter]
    numbers = f", numbers: {parameter}" if parameter else ""
    return line_chart(curves, f"milliseconds of a core a query{numbers}", notes=notes, x_scale="log")


def drift(build: IndexBuild, manifest: Manifest) -> dict[str, Any]:
    """How far the vectors of each generation lie from the centroids, over what the training sample does."""
    (trained,) = _trained(build)
    base = trained["error"]
    ratios = [generation["error"] / base if base else 1.0 for generation in manifest["generations"]]
    vectors = sum(generation["vectors"] for generation in manifest["generations"])
    reasons = []
    if max(ratios) > DRIFTED:
        reasons.append(f"new vectors lie {max(ratios):.2f} times as far from the centroids as the sample did")
    if vectors > FULL * build.rows:
        reasons.append(f"{vectors:,} vectors in lists chosen for {build.rows:,}")
    return {"sample_error": base, "generations": [round(ratio, 4) for ratio in ratios], "rebuild": reasons}


def _sample(build: IndexBuild) -> dict[str, int]:
    """What centroids and codec were trained on: as the first card has it, for _build may be gone since."""
    try:
        return json.loads(build.folder.read(CARD))["sample"]
    except FileNotFoundError:
        folder = build.stage("sample")
        parts = read_manifest(folder)
        held = sum(fact["held"] for fact in facts_of(folder, parts))
        return {
            "rows": sum(part.rows for part in parts) - held,
            "iterations": ITERATIONS if build.kind.has_lists else 0,
        }


def _fewer(build: IndexBuild) -> list[str]:
    """Where there are fewer lists than were chosen."""
    there = lists_in(build)
    if there >= build.choice.lists:
        return []
    return [f"{there:,} lists and not {build.choice.lists:,}: the sample had no more vectors to train them on"]


def _trained(build: IndexBuild) -> list[dict[str, Any]]:
    folder = build.stage("train")
    return facts_of(folder, read_manifest(folder))


def _seconds(build: IndexBuild, stages: StageLog) -> dict[str, float]:
    """By stage, over all commands that came to an end."""
    try:
        before = json.loads(build.folder.read(CARD))["seconds"]
    except FileNotFoundError:
        before = {}
    return {
        stage: round(before.get(stage, 0.0) + stages.seconds.get(stage, 0.0), 3) for stage in before | stages.seconds
    }


def _advice(rows: Sequence[Measured], asked: float) -> list[str]:
    reached = max(row.recall[10][0] for row in rows)
    if reached >= asked:
        return []
    return [
        f"recall@10 {asked:g} was not reached: {reached:.4f} at most. Choose a kind with longer codes (--kind ivf-sq8, or auto with "
        "more --memory), or rerank more candidates"
    ]


def _use(card: Mapping[str, Any]) -> str:
    """How Python opens and searches all of it, merged where it was."""
    files, flags = MERGED_ONES if card["merged"] else MAPPED
    effort = EFFORT.format(name=card["effort"], value=card["advised"]) if card["effort"] else ""
    return USE.format(files=files, flags=flags, effort=effort, dim=card["dim"], sign=SIGN[card["ranks_by"]])


def markdown(card: Mapping[str, Any]) -> str:
    made, sample = card["made"], card["sample"]
    facts = {
        "model": f"{made['model']}, revision {made['revision']}" if made.get("model") else "not told by the vectors",
        "prompt of the passages": repr(made["prompt"]) if made.get("prompt") else "none",
        "prompt of the queries": "the model's own, which search_index.py puts before texts"
        if made.get("model")
        else "not told",
        "vectors": f"{card['vectors']:,} of {card['dim']} dimensions, {card['without_vector']:,} rows without one",
        "metric": METRICS[card["metric"]],
        "index": f"{card['kind']}, {card['lists']:,} lists, {card['pieces']} pieces"
        + (f", merged into {len(card['merged'])}" if card["merged"] else ""),
        "trained on": f"{sample['rows']:,} vectors"
        + (f", {sample['iterations']} iterations" if sample["iterations"] else ""),
        "size": f"{format_bytes(card['bytes'])}, {card['bytes_per_vector']:.1f} bytes a vector, centroids included",
        "drift": f"{card['drift']['generations']} x the sample's error",
    }
    lines = [f"# An index of {card['vectors']:,} vectors, built with Shoal", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", *(f"- {sentence}" for sentence in [*card["why"], *card["notes"], *_rebuild(card)])]
    counted = f"{card['queries']['count']:,} queries ({card['queries']['from']}), against exact search of all vectors"
    lines += ["", "## Recall", "", f"Mean (95 % interval) over {counted}. Advised: {card['advised']}.", ""]
    lines += [f"| {card['effort'] or 'effort'} | {' | '.join(f'recall@{cut}' for cut in CUTS)} | core ms a query |"]
    lines += ["|---|---|---|---|---|", *(_row(row) for row in card["recall"]), "", f"![]({CURVE})"]
    lines += ["", "## Use", "", _use(card)]
    lines += ["", "## Seconds of building, by stage", "", "| | |", "|---|---|"]
    lines += [f"| {stage} | {seconds:,.1f} |" for stage, seconds in card["seconds"].items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in card["versions"].items())]
    return "\n".join(lines) + "\n"


def _rebuild(card: Mapping[str, Any]) -> list[str]:
    reasons = card["drift"]["rebuild"]
    return [f"Rebuild: {'; '.join(reasons)}"] if reasons else []


def _row(row: Mapping[str, Any]) -> str:
    cells = ["{:.4f} ({:.4f} - {:.4f})".format(*row[f"recall@{cut}"]) for cut in CUTS]
    return f"| {row['effort'] or ''} | {' | '.join(cells)} | {row['core_ms']:.3f} |"

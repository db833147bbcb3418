"""The index card: the index, its vectors and its measured recall. JSON for programs, Markdown for people."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...cli.charts import COLOURS, Curve, Note, line_chart
from ...cli.units import format_bytes
from ...engine.job import versions
from ...engine.parts import Part, read_facts, read_manifest
from ...engine.stage_log import StageLog
from ..kinds import to_spec, uses_inner_product
from .config import IndexBuild
from .kmeans import ITERATIONS
from .layout import CARD
from .recall import CUTS, RecallPoint, advised_point
from .segments_job import Manifest, lists_in, segments_of
from .train_job import held_out_rows

README, CURVE = "README.md", "curve.svg"
MAX_DRIFT = 1.25  # times the training sample's error: the centroids no longer lie where the new vectors do
MAX_GROWTH = 8  # times the vectors that the lists were chosen for: the lists have become long

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

segments = [faiss.read_index(path, {flags}) for path in sorted(glob("{files}"))]
{parameter}results = [segment.search(queries, 10) for segment in segments]  # queries: float32 [n, {dim}]
scores, numbers = (np.concatenate(each, axis=1) for each in zip(*results))
best = np.argsort({sign}scores, axis=1)[:, :10]
numbers = np.take_along_axis(numbers, best, axis=1)  # row `number` of rows/, its files in order, has the id
```"""
SET_PARAMETER = """for segment in segments:
    faiss.ParameterSpace().set_index_parameter(segment, "{name}", {value})
"""
SIGN = {"products": "-", "distances": ""}
SEGMENT_FILES = "segments/*.faiss", "faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY"
MERGED_FILES = "merged/*.faiss", "faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR"  # their .ivfdata beside them


def write_card(
    build: IndexBuild,
    manifest: Manifest,
    parts: Sequence[Part],
    points: Sequence[RecallPoint],
    queries: int,
    stages: StageLog,
) -> dict[str, Any]:
    """Write CARD, README and CURVE; return the card."""
    config, segments, lists = build.config, segments_of(manifest), lists_in(build)
    before = build.folder.read_json(CARD) or {}  # of the last command that finished
    vectors, size = (sum(segment[name] for segment in segments) for name in ("vectors", "bytes"))
    spent, new = before.get("seconds", {}), stages.seconds
    if lists < build.choice.lists:
        chosen = f"{lists:,} lists and not {build.choice.lists:,}"
        stages.notes.append(f"{chosen}: the sample had no more vectors to train them on")
    card = {
        "kind": to_spec(build.kind),
        "why": list(build.choice.why),
        "lists": lists,
        "metric": config.metric,
        "dim": build.format.dim,
        "encoder": dict(build.format.encoder),
        "input": config.vectors.input,
        "rows": sum(part.rows for part in parts),
        "vectors": vectors,
        "without_vector": sum(part.errors for part in parts),
        "segments": len(segments),
        "merged": [merged["name"] for merged in manifest["merged"]],
        "bytes": size,
        "bytes_per_vector": size / max(vectors, 1),
        "sample": before.get("sample") or _sample(build),  # the stages may have been deleted since the first card
        "ranks_by": "products" if uses_inner_product(build.kind, config.metric) else "distances",
        "search_parameter": build.kind.search_parameter,
        "advised_value": advised_point(points, config.recall).value,
        "recall": [_recall(point) for point in points],
        "queries": {"count": queries, "from": config.queries or "vectors held out of the training sample"},
        "drift": drift(build, manifest),
        "seconds": {stage: round(spent.get(stage, 0.0) + new.get(stage, 0.0), 3) for stage in spent | new},
        "notes": [*stages.notes, *_advice(points, config.recall)],
        "versions": versions("faiss-cpu", "numpy", "pyarrow", "ray"),
    }
    build.folder.publish(CURVE, recall_chart(card["recall"], build.kind.search_parameter).encode())
    build.folder.publish(README, markdown(card).encode())
    build.folder.publish(CARD, json.dumps(card, indent=1).encode())
    build.folder.sweep(done={CURVE, README, CARD})
    return card


def _recall(point: RecallPoint) -> dict[str, Any]:
    recall = {f"recall@{cut}": [round(value, 5) for value in point.recall[cut]] for cut in CUTS}
    return {"value": point.value, "core_ms": point.seconds * 1000} | recall


def recall_chart(rows: Sequence[Mapping[str, Any]], parameter: str) -> str:
    """Draw recall over the time of a query, with the search parameter's value at each point. rows: `recall` of a card."""
    times = np.array([max(row["core_ms"], 1e-6) for row in rows])  # a logarithm has no zero
    recall = {f"recall@{cut}": np.array([row[f"recall@{cut}"][0] for row in rows]) for cut in CUTS}
    curves = [
        Curve(times, values, name, colour, dots=True)
        for (name, values), colour in zip(recall.items(), COLOURS, strict=True)
    ]
    points = zip(rows, times, recall["recall@10"], strict=True)
    notes = [Note(time, value, str(row["value"])) for row, time, value in points if parameter]
    numbers = f", numbers: {parameter}" if parameter else ""
    return line_chart(curves, f"milliseconds of a core a query{numbers}", notes=notes, x_scale="log")


def drift(build: IndexBuild, manifest: Manifest) -> dict[str, Any]:
    """The quantization error of each generation, relative to that of the training sample; and reasons to rebuild the index."""
    folder = build.stage("train")
    (facts,) = read_facts(folder, read_manifest(folder))
    base = facts["error"]
    ratios = [generation["error"] / base if base else 1.0 for generation in manifest["generations"]]
    vectors = sum(generation["vectors"] for generation in manifest["generations"])
    reasons = []
    if max(ratios) > MAX_DRIFT:
        reasons.append(f"new vectors lie {max(ratios):.2f} times as far from the centroids as the sample did")
    if vectors > MAX_GROWTH * build.rows:
        reasons.append(f"{vectors:,} vectors in lists chosen for {build.rows:,}")
    return {"sample_error": base, "generations": [round(ratio, 4) for ratio in ratios], "rebuild": reasons}


def _sample(build: IndexBuild) -> dict[str, int]:
    """The training of centroids and codec."""
    parts = read_manifest(build.stage("sample"))
    rows = sum(part.rows for part in parts) - held_out_rows(build, parts)
    return {"rows": rows, "iterations": ITERATIONS if build.kind.has_lists else 0}


def _advice(points: Sequence[RecallPoint], wanted: float) -> list[str]:
    reached = max(point.recall[10][0] for point in points)
    if reached >= wanted:
        return []
    return [
        f"recall@10 {wanted:g} was not reached: {reached:.4f} at most. Choose a kind with longer codes (--kind ivf-sq8, or auto with "
        "more --memory), or rerank more candidates"
    ]


def _use(card: Mapping[str, Any]) -> str:
    """Python that opens and searches the whole index, the merged files if there are any."""
    files, flags = MERGED_FILES if card["merged"] else SEGMENT_FILES
    name, value = card["search_parameter"], card["advised_value"]
    parameter = SET_PARAMETER.format(name=name, value=value) if name else ""
    return USE.format(files=files, flags=flags, parameter=parameter, dim=card["dim"], sign=SIGN[card["ranks_by"]])


def markdown(card: Mapping[str, Any]) -> str:
    """The README beside the index."""
    encoder, sample = card["encoder"], card["sample"]
    facts = {
        "model": f"{encoder['model']}, revision {encoder['revision']}" if encoder.get("model") else "not known",
        "prompt of the passages": repr(encoder["prompt"]) if encoder.get("prompt") else "none",
        "prompt of the queries": "the model's own, which search_index.py puts before texts"
        if encoder.get("model")
        else "not known",
        "vectors": f"{card['vectors']:,} of {card['dim']} dimensions, {card['without_vector']:,} rows without one",
        "metric": METRICS[card["metric"]],
        "index": f"{card['kind']}, {card['lists']:,} lists, {card['segments']} segments"
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
    lines += ["", "## Recall", "", f"Mean (95 % interval) over {counted}. Advised: {card['advised_value']}.", ""]
    lines += [
        f"| {card['search_parameter'] or 'value'} | {' | '.join(f'recall@{cut}' for cut in CUTS)} | core ms a query |"
    ]
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
    return f"| {row['value'] or ''} | {' | '.join(cells)} | {row['core_ms']:.3f} |"

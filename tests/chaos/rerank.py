"""The rerank job under fire: its input, its command, and what its rows must be."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tests.chaos.verify import SAMPLE, without_text, wrong
from tests.support.tiny import build_reranker

SCRIPT = "jobs/rerank_pairs.py"
TOLERANCE = 1e-5
SAME_QUERY = 20  # passages a query


def model(folder: Path) -> str:
    return str(build_reranker("bert", folder))


def columns(texts: list[str | None], rng: random.Random) -> dict[str, list[str | None]]:
    """Every text as a passage, SAME_QUERY in a row for one query."""
    queries = [rng.choice(texts) for _ in range(0, len(texts), SAME_QUERY)]
    return {"query": [queries[i // SAME_QUERY] for i in range(len(texts))], "passage": texts}


def check(source: pa.Table, rows: pa.Table, model: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Pairs without a text have a reason and no score, all others the score that they have alone."""
    empty, reasons = without_text(source, rows, ("query", "passage"))
    absent = rows["score"].combine_chunks().is_null().to_numpy(zero_copy_only=False)
    problems = wrong(
        {
            "pairs without a text that lack a reason, or pairs with both that have one": empty != reasons,
            "pairs without a text that have a score, or pairs with both that lack one": empty != absent,
        }
    )
    difference = farthest(source, rows, model, seed)
    if not difference <= TOLERANCE:
        problems.append(f"a score differs by {difference} from that of the pair alone")
    return {"largest difference": difference}, problems


def farthest(source: pa.Table, rows: pa.Table, model: str, seed: int) -> float:
    """The largest difference of SAMPLE stored scores from those of the pairs alone, one by one."""
    from lib.models.reranker import Reranker
    from lib.models.reranker_spec import read_rerank_spec

    good = rows.filter(pc.is_valid(rows["score"]))
    sample = good.take(random.Random(seed).sample(range(len(good)), min(SAMPLE, len(good))))
    pairs = zip(source["query"].to_pylist(), source["passage"].to_pylist(), strict=True)
    pair_of = dict(zip(source["id"].to_pylist(), pairs, strict=True))
    spec = read_rerank_spec(model)
    reranker, form = Reranker(spec, dtype="float32", device="cpu"), spec.pair_format()
    again = [
        reranker.score(form(*([side.strip()] for side in pair_of[key])), np.zeros(1, np.int64))[0]
        for key in sample["id"].to_pylist()
    ]
    return float(np.abs(np.array(again) - sample["score"].to_numpy()).max())

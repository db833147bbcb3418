"""A real model on a real task: the job's score is the plain one, and the same each time. Run by `make scale`."""

import json

import numpy as np
import pytest
import pytrec_eval

from lib.cli.options import configure
from lib.evaluation.config import EvaluateConfig
from lib.evaluation.job import evaluate
from tests.real import tasks

CLOSE = 0.0005  # of NDCG@10


def test_minilm_on_wn8k_scores_as_the_plain_way_does(cluster, minilm, tmp_path):
    """all-MiniLM-L6-v2 on wn-8k by the job, against sentence-transformers, a plain product in numpy and pytrec_eval, in one
    run: NDCG@10 within 0.0005. The job again, from nothing, gives every measure to the last digit."""
    if reason := tasks.missing():
        pytest.skip(reason)
    folder = tasks.wn8k()
    options = {"dataset": str(folder), "model": minilm, "dtype": "float32", "name": "minilm"}
    first, again = (
        evaluate(configure(EvaluateConfig, output=str(tmp_path / name), **options))[0] for name in ("first", "again")
    )
    plain = plain_score(folder, minilm)
    low, high = first.intervals["ndcg_at_10"]
    print(f"NDCG@10 {first.main:.6f} ({low:.4f} - {high:.4f}), the plain way {plain:.6f}; {first.counts}")

    assert first.scores == again.scores
    assert first.main == pytest.approx(plain, abs=CLOSE)


def plain_score(folder, model) -> float:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    corpus, queries = (tasks.texts(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    qrels: dict[str, dict[str, int]] = {}
    for query, passage in tasks.qrels(folder, "test"):
        qrels.setdefault(query, {})[passage] = 1
    passages = encoder.encode(list(corpus.values()), normalize_embeddings=True)
    scores = encoder.encode([queries[query] for query in qrels], normalize_embeddings=True) @ passages.T
    run, ids = {}, list(corpus)
    for query, row in zip(qrels, scores, strict=True):
        run[query] = {ids[place]: float(row[place]) for place in np.argsort(-row)[:1000]}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    assert len(by_query) == len(qrels), json.dumps(sorted(qrels.keys() - by_query.keys()))
    return float(np.mean([each["ndcg_cut_10"] for each in by_query.values()]))

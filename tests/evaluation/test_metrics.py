"""Metrics equal trec_eval's to the ninth decimal, for any run."""

import numpy as np
import pyarrow as pa
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.evaluation.metrics import CUTS, NAMES, evaluate, intervals

PASSAGES = [f"d{i}" for i in range(1500)] + ["é", "中文", "Ünïcode", "d-7", "10", "9"]
QUERIES = [f"q{i}" for i in range(12)]
TREC = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


def evaluate_run(qrels, run):
    """Compute every measure of every query of the qrels: {query: {name: value}}. run: {query: {passage: score}}."""
    queries = list(qrels)
    rows = [(i, passage, score) for i, query in enumerate(queries) for passage, score in run.get(query, {}).items()]
    numbers, passages, scores = zip(*rows, strict=True)
    passages = pa.array(passages, pa.large_string())
    table = pa.table({"query": numbers, "passage": passages, "score": np.array(scores, np.float32)})
    values = evaluate([qrels[query] for query in queries], table)
    return {query: {name: float(values[name][i]) for name in NAMES} for i, query in enumerate(queries)}


@st.composite
def runs(draw):
    """Draw graded qrels, with negative grades and queries without a relevant passage, and a run with ties, near ties that only
    float32 makes equal, missing queries, unjudged passages, and lists longer than the deepest cut."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    qrels, run = {}, {}
    levels = draw(st.sampled_from([2, 5, 50, 10**9]))
    lowest = draw(st.sampled_from([-1, 0, 1]))
    for query in QUERIES:
        judged = random.choice(PASSAGES, size=random.integers(1, 30), replace=False).tolist()
        qrels[query] = {passage: int(random.integers(lowest, 4)) for passage in judged}
        if random.random() < 0.15:
            continue
        passages = random.choice(PASSAGES, size=random.choice([1, 7, 40, 1400]), replace=False).tolist()
        passages = list(dict.fromkeys([*passages, *random.choice(judged, size=len(judged) // 2).tolist()]))
        scores = random.integers(-levels, levels, len(passages)) / levels
        run[query] = {p: float(s + random.choice([0, 1e-12])) for p, s in zip(passages, scores, strict=True)}
    return qrels, run


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs())
def test_metrics_are_trec_evals(case):
    """Every measure at every cut equals pytrec_eval's within 1e-9 for every query, on 200 random runs; a query without a ranking
    scores 0, where pytrec_eval leaves it out."""
    qrels, run = case
    cuts = ",".join(map(str, CUTS))
    theirs = pytrec_eval.RelevanceEvaluator(
        qrels, {*(f"{name}.{cuts}" for name in TREC.values()), "recip_rank"}
    ).evaluate(run)
    ours = evaluate_run(qrels, run)

    assert list(ours) == list(qrels)
    for query, measures in ours.items():
        expected = theirs.get(query, {})
        wanted = {f"{n}_at_{cut}": expected.get(f"{t}_{cut}", 0.0) for n, t in TREC.items() for cut in CUTS}
        first = expected.get("recip_rank", 0.0)
        wanted |= {f"mrr_at_{cut}": first if first >= 1 / cut - 1e-12 else 0.0 for cut in CUTS}
        wrong = {name: (measures[name], value) for name, value in wanted.items() if abs(measures[name] - value) > 1e-9}

        assert not wrong, query


def test_a_score_that_is_not_a_number_is_refused():
    """NaN has no rank, so it raises an error."""
    with pytest.raises(InputError, match="not a number"):
        evaluate_run({"q": {"d": 1}}, {"q": {"d": float("nan"), "e": 1.0}})


def test_intervals_hold_the_mean_as_often_as_they_say():
    """About 95 % of the intervals of 200 samples cover the population's mean; the same values give the same interval."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = intervals(random.beta(0.5, 0.5, size=(200, 1)))[0]
        covered += low <= 0.5 <= high

    assert 180 <= covered <= 199
    values = random.random((50, len(NAMES)))
    np.testing.assert_array_equal(intervals(values), intervals(values))

"""A small dataset, the evaluate job on it in this process, and reference scores by sentence-transformers and pytrec_eval."""

import json

import numpy as np
import pytest
import pytrec_eval

from lib.cli.options import configure
from lib.evaluation.config import EvaluateConfig
from lib.evaluation.job import evaluate
from tests.evaluation.test_dataset import write_jsonl, write_tsv
from tests.support import tiny
from tests.support.messages import listen

WORDS = [word for text in tiny.TEXT for word in text.split()]
RANDOM = np.random.default_rng(0)
PASSAGES = [" ".join(RANDOM.choice(WORDS, size=3 + i % 12)) for i in range(160)]
QRELS = {f"q{i}": {f"p{(7 * i + 13 * j) % 160}": (j % 4) for j in range(1 + i % 9)} for i in range(24)}
QUERIES = [" ".join(PASSAGES[int(list(QRELS[f"q{i}"])[-1][1:])].split()[:4]) for i in range(24)]
TWINS = [p for p in range(160) if not any(f"p{p}" in grades for grades in QRELS.values())][
    :2
]  # equal texts without judgments
CUTS = "1,3,5,10,20,100,1000"


def write_data(folder):
    """Write a BEIR folder: two passages have equal texts, one is empty, and a query has the id of a passage."""
    texts = [*PASSAGES[:-1], ""]
    texts[TWINS[1]] = texts[TWINS[0]]
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"p{i}", "text": text} for i, text in enumerate(texts)])
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)] + [{"_id": "p7", "text": texts[7]}]
    write_jsonl(folder / "queries.jsonl", queries)
    rows = [(query, passage, grade) for query, grades in QRELS.items() for passage, grade in grades.items()]
    write_tsv(folder / "qrels" / "test.tsv", [*rows, ("p7", "p7", 1), ("p7", "p8", 1), ("lost", "p1", 1)])
    return folder


def run(data, **changes):
    messages = listen()
    settings = {"dataset": str(data), "output": str(data.parent / "out"), "dtype": "float32", "executor": "local"}
    results = evaluate(configure(EvaluateConfig, **(settings | changes)))
    return {result.task: result for result in results}, messages


def candidates_of(data):
    """Write 30 candidates for each query, among them the empty passage and an unknown id."""
    rows = [(f"q{i}", f"p{(i * 11 + 5 * j) % 160}") for i in range(24) for j in range(30)]
    write_tsv(data / "candidates.tsv", [*rows, ("q0", "gone")], "query-id\tcorpus-id")
    urls = {
        "corpus": "corpus.jsonl",
        "queries": "queries.jsonl",
        "qrels": "qrels/test.tsv",
        "candidates": "candidates.tsv",
    }
    return {"dataset": None} | {name: str(data / path) for name, path in urls.items()}, rows


def reference_measures(run, without_text=("lost",)):
    """pytrec_eval's averages of a run over all judged queries; queries that are not in the run count as 0."""
    qrels = QRELS | {"p7": {"p7": 1, "p8": 1}} | {query: {"p1": 1} for query in without_text}
    measures = {f"{name}.{CUTS}" for name in ("ndcg_cut", "map_cut", "recall", "P")}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    names = {"ndcg_cut": "ndcg", "map_cut": "map", "recall": "recall", "P": "precision"}
    return {
        f"{ours}_at_{cut}": sum(each[f"{theirs}_{cut}"] for each in by_query.values()) / len(qrels)
        for theirs, ours in names.items()
        for cut in CUTS.split(",")
    }


def reference_vectors(model, texts, prompt, normalize):
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    return encoder.encode(texts, prompt=prompt, normalize_embeddings=normalize)


def reference_run(data, model, identical=True, prompts=("", ""), normalize=True):
    """The run of sentence-transformers and numpy over every passage with a text. prompts: of queries and of passages."""
    corpus, queries = ([json.loads(line) for line in (data / f"{n}.jsonl").open()] for n in ("corpus", "queries"))
    corpus = [row for row in corpus if row["text"]]
    query_vectors = reference_vectors(model, [query["text"] for query in queries], prompts[0], normalize)
    scores = query_vectors @ reference_vectors(model, [passage["text"] for passage in corpus], prompts[1], normalize).T
    return {
        query["_id"]: {
            passage["_id"]: float(score)
            for passage, score in zip(corpus, row, strict=True)
            if identical or passage["_id"] != query["_id"]
        }
        for query, row in zip(queries, scores, strict=True)
    }


def assert_scores(result, expected):
    """Every measure is the expected one. The tolerance is smaller than the change by one misplaced passage."""
    for name, value in expected.items():
        assert result.scores[name] == pytest.approx(value, abs=1e-6), name


def reference_scores(model, pairs):
    from sentence_transformers import CrossEncoder

    return CrossEncoder(model, device="cpu").predict(pairs)


def reference_reranking(data, model, pairs):
    """The run of CrossEncoder over pairs of ids whose passage has a text."""
    texts = {
        row["_id"]: row["text"] for n in ("corpus", "queries") for row in map(json.loads, (data / f"{n}.jsonl").open())
    }
    pairs = [pair for pair in pairs if texts.get(pair[1])]
    run: dict[str, dict[str, float]] = {}
    for (query, passage), score in zip(
        pairs, reference_scores(model, [(texts[q], texts[p]) for q, p in pairs]), strict=True
    ):
        run.setdefault(query, {})[passage] = float(score)
    return run


def lines(path):
    return [json.loads(line) for line in path.open()]

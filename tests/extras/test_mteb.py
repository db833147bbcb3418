"""mteb itself on a real local task: its scores of our vectors are ours, and it drives our encoder and reranker."""

import hashlib
import json
from pathlib import Path

import mteb
import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.results import TaskResult

from lib.cli.options import configure, flat
from lib.evaluation.config import EvaluateConfig
from lib.evaluation.job import evaluate
from lib.evaluation.metrics import CUTS, MEASURES
from lib.evaluation.mteb_adapter import MtebEncoder, MtebSearch
from tests.evaluation.test_dataset import write_tsv
from tests.real import tasks
from tests.support import tiny

NAMES = [f"{measure}_at_{cut}" for measure in MEASURES for cut in CUTS]
ROUNDED = 5e-6  # mteb rounds to five decimals
CANDIDATES = 40


@pytest.fixture(scope="session")
def folder() -> Path:
    """manzh: 692 Chinese manual pages and their short descriptions."""
    if reason := tasks.missing():
        pytest.skip(reason)
    return tasks.manzh()


@pytest.fixture(scope="session")
def data(folder) -> dict:
    corpus, queries = tasks.texts(folder / "corpus.jsonl"), tasks.texts(folder / "queries.jsonl")
    qrels: dict[str, dict[str, int]] = {}
    for query, passage in tasks.qrels(folder, "test"):
        qrels.setdefault(query, {})[passage] = 1
    listed = {query: sorted({*judged, *_others(query, corpus)}) for query, judged in qrels.items()}
    return {"corpus": corpus, "queries": queries, "qrels": qrels, "candidates": listed}


def _others(query: str, corpus: dict[str, str]) -> list[str]:
    """CANDIDATES passages, always the same."""
    return sorted(corpus, key=lambda passage: hashlib.sha256(f"{query} {passage}".encode()).digest())[:CANDIDATES]


@pytest.fixture(scope="session")
def urls(data, folder, tmp_path_factory) -> dict[str, str]:
    """The reranking task as the evaluate job takes it."""
    path = tmp_path_factory.mktemp("candidates") / "candidates.tsv"
    pairs = [(query, passage) for query, listed in data["candidates"].items() for passage in listed]
    write_tsv(path, pairs, "query-id\tcorpus-id")
    names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}
    return {name: str(folder / path) for name, path in names.items()} | {"candidates": str(path)}


def local_task(data: dict, reranking: bool) -> AbsTaskRetrieval:
    """The same data as a task of mteb's own."""
    kind, main = ("Reranking", "map_at_1000") if reranking else ("Retrieval", "ndcg_at_10")
    about = {"path": "local/manzh", "revision": "local"}
    name = f"Manzh{kind}"

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name, description=name, dataset=about, type=kind, category="t2t", modalities=["text"],
            eval_splits=["test"], eval_langs=["cmn-Hans"], main_score=main, prompt="Given a description, retrieve its page",
        )  # fmt: skip

        def load_data(self, num_proc=None, *, timer=None, **kwargs):
            judged = [{"id": query, "text": data["queries"][query]} for query in data["qrels"]]
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(
                        corpus=Dataset.from_list(
                            [{"id": k, "title": "", "text": v} for k, v in data["corpus"].items()]
                        ),
                        queries=Dataset.from_list(judged),
                        relevant_docs=data["qrels"],
                        top_ranked=data["candidates"] if reranking else None,
                    )
                }
            }
            self.data_loaded = True

    return Local()


class StoredVectors:
    """mteb's encoder protocol over the vectors that an evaluation has left: mteb searches and scores them itself."""

    mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "shoal/stored", "revision": "1"})

    def __init__(self, work: Path, task: str) -> None:
        self.vectors: dict[str, np.ndarray] = {}
        for part in [
            *work.glob(f"{task}-*/_stages/queries-*/part-*"),
            *work.glob("corpus-*/_stages/passages-*/part-*"),
        ]:
            table = pq.read_table(part)
            flat = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            self.vectors |= dict(zip(table["id"].to_pylist(), flat, strict=True))

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        return np.stack([self.vectors[name] for batch in inputs for name in batch["id"]])

    def similarity(self, left, right):
        return np.asarray(left) @ np.asarray(right).T

    def similarity_pairwise(self, left, right):
        return (np.asarray(left) * np.asarray(right)).sum(axis=-1)


def by_mteb(model, data, reranking=False) -> dict[str, float]:
    task = local_task(data, reranking)
    results = mteb.evaluate(model, [task], cache=None, co2_tracker=False, show_progress_bar=False)
    (scores,) = results.task_results[0].scores["test"]
    return {name: float(scores[name]) for name in [*NAMES, "main_score"]}


def same(theirs: dict[str, float], ours, tolerance: float) -> None:
    for name in NAMES:
        assert theirs[name] == pytest.approx(ours.scores[name], abs=tolerance), name
    assert theirs["main_score"] == pytest.approx(ours.main, abs=tolerance)


@pytest.fixture(scope="session")
def config(cluster, minilm, tmp_path_factory) -> EvaluateConfig:
    output = str(tmp_path_factory.mktemp("evaluation"))
    return configure(EvaluateConfig, output=output, model=minilm, name="minilm", dtype="float32", task=("manzh",))


def changed(config: EvaluateConfig, **changes) -> EvaluateConfig:
    return configure(EvaluateConfig, **(flat(config) | changes))


@pytest.fixture(scope="session")
def retrieved(config, folder):
    (result,) = evaluate(changed(config, dataset=str(folder)))
    return result


@pytest.fixture(scope="session")
def ranked(config, urls):
    (result,) = evaluate(changed(config, task=("reranked",), **urls))
    return result


def test_mteb_scores_our_vectors_alike(data, config, retrieved, ranked):
    """mteb searches and scores the vectors that our evaluations left: every measure of retrieval and of reranking is ours,
    to the five decimals that it rounds to."""
    for result, reranking in ((retrieved, False), (ranked, True)):
        stored = StoredVectors(Path(config.output, "_stages"), result.task)
        same(by_mteb(stored, data, reranking), result, ROUNDED)
    assert retrieved.main_score == "ndcg_at_10"
    assert ranked.main_score == "map_at_1000"


def test_mteb_drives_our_search(data, config, retrieved, ranked):
    """Through MtebSearch the engine embeds and searches, mteb scores: our own scores. A second run computes nothing."""
    same(by_mteb(MtebSearch(config), data), retrieved, 1e-4)  # vectors made in other batches; a rank may change
    same(by_mteb(MtebSearch(config), data, reranking=True), ranked, 1e-4)
    parts = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("part-*")}
    by_mteb(MtebSearch(config), data)
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("part-*")} == parts


def test_mteb_drives_our_encoder(data, config, retrieved):
    """Through MtebEncoder the engine embeds, mteb searches and scores: our own scores."""
    same(by_mteb(MtebEncoder(config), data), retrieved, 1e-4)


def test_mteb_drives_our_reranker(data, config, urls, tmp_path):
    """A reranker alone orders the candidates that mteb gives: our own scores."""
    reranker = str(tiny.build_reranker("bert", tmp_path / "reranker"))
    few = data | {"qrels": {query: data["qrels"][query] for query in list(data["qrels"])[:20]}}
    few["candidates"] = {query: data["candidates"][query] for query in few["qrels"]}
    write_tsv(tmp_path / "qrels.tsv", [(q, p, 1) for q, judged in few["qrels"].items() for p in judged])
    alone = changed(config, model=None, reranker=reranker, name="reranker", task=("few",))
    (ours,) = evaluate(changed(alone, **(urls | {"qrels": str(tmp_path / "qrels.tsv")})))

    same(by_mteb(MtebSearch(alone), few, reranking=True), ours, 1e-4)


def test_mteb_reads_our_results(config, retrieved):
    """The file in mteb's layout is one that mteb loads, with the same main score."""
    (path,) = Path(config.output, "mteb", "minilm").rglob("manzh.json")
    result = TaskResult.from_disk(path)

    assert result.get_score() == pytest.approx(retrieved.main, abs=ROUNDED)
    assert json.loads(path.read_text())["task_name"] == "manzh"

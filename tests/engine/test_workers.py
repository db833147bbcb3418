"""Which workers a run has, and which the steps before it have."""

import json

import pytest

import lib.engine.workers
from lib.engine.workers import WorkerOptions, parse_labels, plan_workers
from lib.errors import UsageError
from lib.reranking import candidates
from lib.reranking.mapper import RerankConfig
from lib.training.data.sources import open_entry

SAID = {"max_workers": 7, "worker_label": ("ray.io/accelerator-type=L4",)}


@pytest.fixture
def lines(tmp_path):
    def write(name: str, *rows: dict) -> str:
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(tmp_path / name)

    return write


def test_the_steps_before_a_run_keep_to_its_workers(lines, tmp_path):
    """Joining candidates and dealing pairs, on CPUs, have the run's own most workers and labels: a cluster that grows refuses a
    step that does not say them, and would bring nodes of any kind for it."""
    reranked = RerankConfig(
        input=lines("candidates.jsonl", {"query_id": "q", "passage_id": "p"}),
        queries=lines("queries.jsonl", {"_id": "q", "text": "a"}),
        corpus=lines("corpus.jsonl", {"_id": "p", "text": "b"}),
        output=str(tmp_path / "out"),
        gpus_per_worker=1.0,
        **SAID,
    )
    steps = [table.options for table in candidates._tables(reranked).values()]
    pairs = lines("pairs.jsonl", {"query": "a", "pos": ["b"]})
    steps.append(
        open_entry("pairs", pairs, str(tmp_path / "out"), (), WorkerOptions(gpus_per_worker=1.0, **SAID)).options
    )

    assert [(step.gpus_per_worker, step.max_workers, step.worker_label) for step in steps] == [
        (0.0, *SAID.values())
    ] * 4


def test_on_a_cluster_that_grows_workers_with_a_model_say_their_cpus(monkeypatch):
    """No node is there whose memory would tell how many CPUs a worker of a model needs; a step without a model needs one."""
    monkeypatch.setattr(lib.engine.workers, "_nodes", lambda labels=None: [])
    monkeypatch.setattr(lib.engine.workers, "_grows", lambda: True)
    options = WorkerOptions(gpus_per_worker=0, max_workers=2)
    with pytest.raises(UsageError, match="--cpus-per-worker"):
        plan_workers(options, weight_bytes=10**9)

    assert plan_workers(options, weight_bytes=0).cpus == pytest.approx(0.9)


@pytest.mark.parametrize("words", [("a",), ("a=",), ("=b",), ("a=b", "a=c")])
def test_labels_that_are_none_are_refused(words):
    """A label without a value, without a name, or named twice."""
    with pytest.raises(UsageError, match="--worker-label"):
        parse_labels(words)

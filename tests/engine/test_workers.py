"""The workers of a run: how many, of which size, on which nodes; and a refusal of what no node can give."""

import json
import time
from dataclasses import replace

import pytest

from lib.cli.options import configure
from lib.engine import workers as module
from lib.engine.nodes import parse_labels
from lib.engine.workers import (
    CpuWorkerOptions,
    WorkerOptions,
    WorkerPlan,
    WorkerRequest,
    plan_workers,
    with_current_nodes,
)
from lib.errors import RunError, UsageError
from lib.reranking import candidates
from lib.reranking.config import RerankConfig

LABELS = ("ray.io/accelerator-type=L4",)


@pytest.fixture
def nodes(monkeypatch):
    """nodes(*resources, growing=False): the nodes of the cluster from now on."""

    def have(*resources, growing=False):
        monkeypatch.setattr(module, "live_nodes", lambda labels=None: list(resources))
        monkeypatch.setattr(module, "cluster_grows", lambda: growing)

    return have


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus_per_worker": 64}, "no node has 57.6 CPU"),
        ({"gpus_per_worker": 1}, "no node has 1 GPU"),
        ({"min_workers": 500}, "room for"),
    ],
)
def test_a_cluster_without_room_is_refused_at_once(cluster, options, message):
    """Ray Data would wait for ever without a word; the driver says what does not fit, and what to change."""
    began = time.monotonic()
    with pytest.raises(RunError, match=message):
        plan_workers(WorkerOptions(**options), 0)
    assert time.monotonic() - began < 5


def test_a_model_larger_than_the_nodes_is_refused(cluster):
    """A worker that no node has the memory for is refused with both figures."""
    with pytest.raises(RunError, match="GiB"):
        plan_workers(WorkerOptions(), 10**13)


def test_more_workers_at_least_than_at_most_is_a_usage_error(cluster):
    """--min-workers over --max-workers is refused."""
    with pytest.raises(UsageError, match="--min-workers 3"):
        plan_workers(WorkerOptions(min_workers=3, max_workers=2), 0)


def test_on_a_cluster_that_grows_the_command_gives_the_sizes(nodes):
    """Where an autoscaler runs, a resource that no present node has is no error, and the pool may grow to --max-workers. Ray
    does not describe its nodes, so a command without sizes is refused. Without an autoscaler, no node with a GPU is an error."""
    nodes({"CPU": 0.0}, growing=True)
    workers = plan_workers(WorkerOptions(max_workers=16, gpus_per_worker=1, worker_label=LABELS), 0)
    assert (workers.minimum, workers.initial, workers.maximum, workers.gpus) == (1, 1, 16, 1)
    for options in (WorkerOptions(max_workers=16), WorkerOptions(gpus_per_worker=1)):
        with pytest.raises(UsageError, match="--max-workers, and --gpus-per-worker"):
            plan_workers(options, 0)

    nodes({"CPU": 0.0})
    with pytest.raises(RunError, match="no node has 1 GPU"):
        plan_workers(WorkerOptions(gpus_per_worker=1, max_workers=16), 0)


def test_on_a_cluster_that_grows_workers_with_a_model_give_their_cpus(nodes):
    """No node is there whose memory would decide the CPUs of a worker with a model; a step without a model needs one."""
    nodes(growing=True)
    options = WorkerOptions(gpus_per_worker=0, max_workers=2)
    with pytest.raises(UsageError, match="--cpus-per-worker"):
        plan_workers(options, weight_bytes=10**9)

    assert plan_workers(options, weight_bytes=0).cpus == pytest.approx(0.9)


def test_a_wave_starts_with_the_nodes_of_its_time(nodes):
    """The next wave of a pool that began with one worker starts as many as the present nodes have room for."""
    nodes(*[{"CPU": 8.0, "GPU": 1.0}] * 5)
    one = WorkerPlan(minimum=1, initial=1, maximum=4, cores=1, cpus=1.0, gpus=1.0, task_cpus=1.0)

    assert with_current_nodes(one).initial == 4
    assert with_current_nodes(replace(one, maximum=16)).initial == 5


def test_no_more_workers_than_the_memory_and_the_tasks_allow(nodes):
    """Workers of a large model stop at the node's memory; workers of a quarter GPU leave a CPU to the readers."""
    gib = 2.0**30
    nodes({"CPU": 16.0, "memory": 32 * gib})
    assert plan_workers(WorkerOptions(cpus_per_worker=1), int(5 * gib)).maximum == 3  # of 9.5 GiB each

    nodes({"CPU": 4.0, "GPU": 1.0})
    assert plan_workers(WorkerOptions(gpus_per_worker=0.25), 0).maximum == 3


def test_steps_on_cpus_keep_to_the_workers_of_the_run():
    """Joining candidates and partitioning pairs have the run's own most workers and labels, on CPUs: a cluster that grows
    refuses a step without them, and would start nodes of any kind for it."""
    step = WorkerOptions(gpus_per_worker=1.0, max_workers=7, worker_label=LABELS).on_cpus()

    assert (step.gpus_per_worker, step.max_workers, step.worker_label) == (0.0, 7, LABELS)


def test_the_join_of_candidates_asks_for_no_gpu(tmp_path, monkeypatch):
    """Every step of the join asks for the workers of `on_cpus`."""
    rows = {"candidates": {"query_id": "q", "passage_id": "p"}, "queries": {"_id": "q", "text": "a"}}
    for name, row in (rows | {"corpus": {"_id": "p", "text": "b"}}).items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    inputs = {name: str(tmp_path / f"{name}.jsonl") for name in ("queries", "corpus")}
    options = {"executor": "local", "gpus_per_worker": 1.0, "max_workers": 7, "worker_label": LABELS}
    config = configure(
        RerankConfig, input=str(tmp_path / "candidates.jsonl"), output=str(tmp_path / "out"), **inputs, **options
    )
    requests = []
    resolve = WorkerRequest.resolve
    monkeypatch.setattr(WorkerRequest, "resolve", lambda self: requests.append(self.options) or resolve(self))
    candidates.join(config)

    assert len(requests) >= 4
    assert {(each.gpus_per_worker, each.max_workers, each.worker_label) for each in requests} == {(0.0, 7, LABELS)}


def test_the_local_executor_needs_no_cluster():
    """One worker, this process, with the CPUs of the machine or of the command; nothing of Ray is started."""
    plan = WorkerRequest(CpuWorkerOptions(executor="local", cpus_per_worker=3)).resolve()

    assert plan.in_process
    assert (plan.minimum, plan.maximum, plan.threads) == (1, 1, 3)


@pytest.mark.parametrize("words", [("a",), ("a=",), ("=b",), ("a=b", "a=c")])
def test_labels_that_are_none_are_refused(words):
    """A label without a value, without a name, or named twice."""
    with pytest.raises(UsageError, match="--worker-label"):
        parse_labels(words)

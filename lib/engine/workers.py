"""Which workers a run has: what each takes of its node, how many, and what no node can give, refused.

Ray Data waits for ever, without a word, when no node has room for an actor or a task; so everything is held against
the nodes here, before anything is asked of Ray. Where an autoscaler runs, the nodes are those that it will start, of which Ray
tells nobody: there the user says what a worker takes, and how many there may be.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from ..errors import RunError, UsageError

# A worker on CPUs asks for a little less than its cores, so that the processes that read and write, which mostly wait,
# always find room, were every other node lost: without it Ray Data hangs on a full cluster.
WORKER_SHARE = 0.9
TASK_CPUS_BESIDE_CPU_WORKERS = 0.001
TASK_CPUS_BESIDE_GPU_WORKERS = 1.0
WEIGHTS_FACTOR = 1.6  # memory of a loaded worker over its weights: activations, torch itself, one shard
WORKER_BASE = 1.5 * 2**30  # bytes; interpreter, torch and buffers
EVERYWHERE: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class CpuWorkerOptions:
    """How many workers on CPUs, and what each takes."""

    max_workers: int | None = field(
        default=None, metadata={"help": "Workers to grow to. Default: as many as the cluster has room for.", "min": 1}
    )
    cpus_per_worker: float | None = field(
        default=None, metadata={"help": "CPUs a worker. Default: 1; more where the model's weights need the memory."}
    )
    worker_label: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Run on nodes with this Ray label only, as ray.io/accelerator-type=L4. Repeat it for more.",
            "many": True,
        },
    )


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(CpuWorkerOptions):
    """How many workers, and what each takes."""

    min_workers: int | None = field(default=None, metadata={"help": "Workers to keep. Default: 1.", "min": 1})
    gpus_per_worker: float | None = field(
        default=None, metadata={"help": "GPUs a worker, 0.5 for two workers a GPU. Default: 1 where there are GPUs."}
    )


def beside(options: WorkerOptions) -> dict[str, Any]:
    """Options of a step without a model, beside or before the run that `options` are of: on CPUs, on the same nodes."""
    return {"gpus_per_worker": 0.0, "max_workers": options.max_workers, "worker_label": options.worker_label}


@dataclass(frozen=True)
class WorkerPlan:
    """The decision: pool size, and the Ray resources of a worker and of a reading or writing process."""

    minimum: int
    initial: int  # what the nodes at hand take: Ray Data's own growth adds one at a time, seconds apart
    maximum: int
    threads: int
    cpus: float
    gpus: float
    task_cpus: float
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes that all of it runs on
    memory: int = 0  # bytes, 0 where not counted

    def at_most(self, count: int) -> "WorkerPlan":
        """No more workers than there are shards."""
        sizes = {name: min(getattr(self, name), count) for name in ("minimum", "initial", "maximum")}
        return replace(self, **sizes)

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.threads} CPU"
        return (
            f"{self.minimum} to {self.maximum} workers of {each}"
            if self.minimum < self.maximum
            else (f"{self.maximum} worker{'s' * (self.maximum > 1)} of {each}")
        )


def largest_node_cpus(options: CpuWorkerOptions) -> float:
    """CPUs of the node that has most of them, of those that the options allow: what was said where none is there yet."""
    there = max((node.get("CPU", 0) for node in _nodes(parse_labels(options.worker_label))), default=0)
    return there or options.cpus_per_worker or 1.0


def largest_node(labels: Mapping[str, str]) -> float | None:
    """CPUs of the node that has most of them, where no node with the labels has a GPU: None where one has."""
    nodes = _nodes(labels) or [{}]
    return None if any(node.get("GPU", 0) >= 1 for node in nodes) else max(node.get("CPU", 1) for node in nodes)


def plan_workers(options: WorkerOptions, weight_bytes: int) -> WorkerPlan:
    """Hold what was asked against the nodes there are, or may come. Raises ShoalError saying what to change."""
    labels = parse_labels(options.worker_label)
    nodes, growing = _nodes(labels), _grows()
    if growing:
        _refuse_unsaid(options, weight_bytes)
    else:
        _refuse_unknown_labels(labels, nodes)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    need = _need(options, gpus, nodes, weight_bytes)
    pool = _pool(options, sum(map(need.places, nodes)))
    if not growing:
        _refuse_unfit(need, pool[0], nodes)
    return WorkerPlan(*pool, max(1, int(need.cores)), need.cpus, gpus, need.task_cpus, labels, need.memory)


def _need(
    options: WorkerOptions, gpus: float, nodes: Sequence[Mapping[str, float]], weight_bytes: int
) -> "WorkerResources":
    if gpus:
        cpus = options.cpus_per_worker or 1.0
        return WorkerResources(cpus, cpus, TASK_CPUS_BESIDE_GPU_WORKERS, gpus, memory=0)
    cores = options.cpus_per_worker or _cores_for_memory(nodes, weight_bytes)
    return WorkerResources(
        cores, WORKER_SHARE * cores, TASK_CPUS_BESIDE_CPU_WORKERS, gpus=0.0, memory=worker_memory(weight_bytes)
    )


def _grows() -> bool:
    """Whether an autoscaler runs, which adds nodes for what waits."""
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return is_autoscaler_v2(fetch_from_server=True)
    except Exception:  # a private call, whose absence costs only that a cluster of no nodes is refused
        return False


def require_explicit_sizes(options: WorkerOptions, weight_bytes: int) -> None:
    """For what decides its workers late. Raises UsageError on a cluster that grows when the command does not say their sizes."""
    if _grows():
        _refuse_unsaid(options, weight_bytes)


def _refuse_unsaid(options: WorkerOptions, weight_bytes: int) -> None:
    unsized = options.gpus_per_worker == 0 and weight_bytes and not options.cpus_per_worker
    if options.gpus_per_worker is None or options.max_workers is None or unsized:
        raise UsageError(
            "the cluster grows with what a job asks for, and does not say beforehand what its nodes will have. Say "
            "--max-workers, and --gpus-per-worker (1, or 0 for workers on CPUs, with --cpus-per-worker)"
        )


def with_current_nodes(workers: WorkerPlan) -> WorkerPlan:
    """With as many at first as the nodes take that are there by now."""
    need = WorkerResources(workers.threads, workers.cpus, workers.task_cpus, workers.gpus, workers.memory)
    places = sum(map(need.places, _nodes(workers.labels)))
    return replace(workers, initial=max(workers.initial, min(workers.maximum, places)))


def parse_labels(words: Iterable[str]) -> dict[str, str]:
    """`key=value` words, of which a value may be what Ray's label selectors take: `!spot`, `in(L4,A10G)`. Raises UsageError."""
    pairs = [word.partition("=") for word in words]
    for key, _, value in pairs:
        if not key or not value:
            raise UsageError(f"--worker-label {key!r} is not KEY=VALUE, as in ray.io/accelerator-type=L4")
    if len({key for key, *_ in pairs}) < len(pairs):
        raise UsageError("--worker-label names a label twice. Write its values as in(L4,A10G)")
    return {key: value for key, _, value in pairs}


def _has(labels: Mapping[str, str], key: str, wanted: str) -> bool:
    value = wanted.removeprefix("!")
    values = [one.strip() for one in value[3:-1].split(",")] if value.startswith("in(") else [value]
    return (labels.get(key) in values) != wanted.startswith("!")


@dataclass(frozen=True)
class WorkerResources:
    """What a worker takes of its node, and a reading or writing task beside it. memory: bytes, 0 where not counted."""

    cores: float  # that it computes with
    cpus: float  # that it asks of Ray
    task_cpus: float
    gpus: float
    memory: int

    def places(self, node: Mapping[str, float]) -> int:
        """Workers that the node has room for, with a task beside them."""
        limits = [node.get("CPU", 0) / self.cores, (node.get("CPU", 0) - self.task_cpus) / self.cpus]
        if self.gpus:
            limits = [limits[1], node.get("GPU", 0) / self.gpus]
        if self.memory and node.get("memory"):
            limits.append(node["memory"] / self.memory)
        return max(0, int(min(limits) + 1e-6))


def _pool(options: WorkerOptions, places: int) -> tuple[int, int, int]:
    """Workers at least, at first and at most, where the nodes have room for `places`."""
    minimum = options.min_workers or 1
    maximum = options.max_workers or max(places, minimum)
    if minimum > maximum:
        raise UsageError(f"--min-workers {minimum} is over --max-workers {maximum}")
    return minimum, min(maximum, max(minimum, places)), maximum


def _cores_for_memory(nodes: Sequence[Mapping[str, float]], weight_bytes: int) -> float:
    """One core a worker, more where workers of one core would not fit the node's memory."""
    node = max(nodes, key=lambda n: n.get("CPU", 0), default={})
    fitting = max(1, int(node.get("memory", 0) // worker_memory(weight_bytes)))
    cpus = max(1, int(node.get("CPU", 1)))
    return float(max(1, cpus // min(cpus, fitting)))


def worker_memory(weight_bytes: int) -> int:
    """Bytes one worker is expected to take."""
    return int(weight_bytes * WEIGHTS_FACTOR + WORKER_BASE)


def node_memory(node: str) -> float:
    """Bytes that a node has for workers; without end where Ray does not tell."""
    import ray

    return next((each["Resources"].get("memory", inf) for each in ray.nodes() if each["NodeID"] == node), inf)


def _nodes(labels: Mapping[str, str] = EVERYWHERE) -> Sequence[Mapping[str, float]]:
    """Resources of each live node with these labels."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in alive if all(_has(node["Labels"], *label) for label in labels.items())]


def _refuse_unknown_labels(labels: Mapping[str, str], nodes: Sequence[Mapping[str, float]]) -> None:
    if labels and not nodes:
        import ray

        there = sorted({f"{k}={v}" for node in ray.nodes() for k, v in node["Labels"].items() if k != "ray.io/node-id"})
        asked = " ".join(f"{key}={value}" for key, value in labels.items())
        raise RunError(f"no node has the labels {asked}. There are {', '.join(there) or 'none'}: choose from these")


def _refuse_unfit(need: WorkerResources, least: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """At least one worker, and `least` of them, must fit the nodes, with room beside each for a task."""
    there = "; ".join(sorted({_describe(node) for node in nodes}))
    places = sum(map(need.places, nodes))
    if places == 0 and any(replace(need, memory=0).places(node) for node in nodes):
        raise RunError(
            f"a worker needs about {need.memory / 2**30:.1f} GiB, and no node has as much for tasks ({there}). Choose a "
            "smaller model or larger nodes"
        )
    if places == 0:
        asked = f"{need.gpus:g} GPU and {need.cpus:g} CPU" if need.gpus else f"{need.cpus:g} CPU"
        raise RunError(
            f"no node has {asked} for a worker and {need.task_cpus:g} CPU for a task beside it. Nodes: {there}. "
            "Lower --cpus-per-worker or --gpus-per-worker, or add nodes"
        )
    if least > places:
        raise RunError(f"--min-workers {least}, but the nodes have room for {places} ({there}). Lower it, or add nodes")


def _describe(node: Mapping[str, Any]) -> str:
    gpu = f", {node['GPU']:g} GPU" if node.get("GPU") else ""
    return f"{node.get('CPU', 0):g} CPU{gpu}, {node.get('memory', 0) / 2**30:.1f} GiB"

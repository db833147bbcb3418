"""Workers of a run: the resources of each, how many there are, and a refusal of what no node can give.

Ray Data waits for ever, without a word, when no node has room for an actor or a task; so everything is compared
with the nodes here, before any request to Ray. Where an autoscaler runs, the nodes are those that it will start, which Ray
does not describe: there the command must give the size of a worker, and the largest number of workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import sched_getaffinity
from typing import Literal

from ..cli.options import option
from ..errors import RunError, UsageError
from .cluster import connect
from .nodes import check_labels, cluster_grows, describe_nodes, live_nodes, parse_labels

# A worker on CPUs asks for a little less than its cores, so that the processes that read and write, which mostly wait,
# always find room, were every other node lost: without it Ray Data hangs on a full cluster.
WORKER_SHARE = 0.9
TASK_CPUS_BESIDE_CPU_WORKERS = 0.001
TASK_CPUS_BESIDE_GPU_WORKERS = 1.0
WEIGHTS_FACTOR = 1.6  # memory of a loaded worker over its weights: activations, torch itself, one shard
WORKER_BASE = 1.5 * 2**30  # bytes; interpreter, torch and buffers


@dataclass(frozen=True, kw_only=True)
class CpuWorkerOptions:
    """The number and size of workers on CPUs."""

    executor: Literal["ray", "local"] = option(
        "ray: workers of a Ray cluster, of this machine if there is none. local: in this process, without Ray.", "ray"
    )
    max_workers: int | None = option("Workers to grow to. Default: as many as the cluster has room for.", None, min=1)
    cpus_per_worker: float | None = option(
        "CPUs a worker. Default: 1; more where the model's weights need the memory.", None
    )
    worker_label: tuple[str, ...] = option(
        "Run on nodes with this Ray label only, as ray.io/accelerator-type=L4. Repeat it for more.", (), many=True
    )

    @property
    def is_local(self) -> bool:
        return self.executor == "local"

    def on_cpus(self) -> "WorkerOptions":
        """For a step without a model, on the same nodes."""
        return WorkerOptions(
            executor=self.executor, gpus_per_worker=0.0, max_workers=self.max_workers, worker_label=self.worker_label
        )


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(CpuWorkerOptions):
    """The number and size of workers."""

    min_workers: int | None = option("Workers to keep. Default: 1.", None, min=1)
    gpus_per_worker: float | None = option(
        "GPUs a worker, 0.5 for two workers a GPU. Default: 1 where there are GPUs.", None
    )


@dataclass(frozen=True)
class WorkerPlan:
    """The decision: pool size, and the Ray resources of a worker and of a reading or writing process."""

    minimum: int
    initial: int  # what the nodes at hand take: Ray Data's own growth adds one at a time, seconds apart
    maximum: int
    cores: float  # a worker computes with so many
    cpus: float  # and requests so many of Ray
    gpus: float
    task_cpus: float
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes that all of it runs on
    memory: int = 0  # bytes, 0 where not counted
    in_process: bool = False  # one worker, the driver itself

    @property
    def threads(self) -> int:
        return max(1, int(self.cores))

    @property
    def device(self) -> str:
        """The torch device of a worker."""
        return "cuda" if self.gpus else "cpu"

    def at_most(self, count: int) -> "WorkerPlan":
        """No more workers than there are shards."""
        sizes = {name: min(getattr(self, name), count) for name in ("minimum", "initial", "maximum")}
        return replace(self, **sizes)

    def places(self, node: Mapping[str, float]) -> int:
        """Workers that a node has room for, with a task beside them."""
        limits = [node.get("CPU", 0) / self.cores, (node.get("CPU", 0) - self.task_cpus) / self.cpus]
        if self.gpus:
            limits = [limits[1], node.get("GPU", 0) / self.gpus]
        if self.memory and node.get("memory"):
            limits.append(node["memory"] / self.memory)
        return max(0, int(min(limits) + 1e-6))

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.threads} CPU"
        if self.minimum < self.maximum:
            return f"{self.minimum} to {self.maximum} workers of {each}"
        return f"{self.maximum} worker{'s' * (self.maximum > 1)} of {each}"


@dataclass(frozen=True)
class WorkerRequest:
    """The workers that a command wants, before it is known what the cluster has. weight_bytes: of the model that each loads."""

    options: CpuWorkerOptions
    weight_bytes: int = 0

    @cached_property
    def _plan(self) -> WorkerPlan:
        if self.options.is_local:
            return local_plan(self.options)
        connect()
        options = self.options if isinstance(self.options, WorkerOptions) else self.options.on_cpus()
        return plan_workers(options, self.weight_bytes)

    def resolve(self) -> WorkerPlan:
        """Join or start the cluster, once, and decide. Raises ShoalError that says what to change."""
        return self._plan


def local_plan(options: CpuWorkerOptions) -> WorkerPlan:
    """One worker in this process, with all of its CPUs, or with a GPU where there is one."""
    cores = max(1, int(options.cpus_per_worker or len(sched_getaffinity(0))))
    gpus = getattr(options, "gpus_per_worker", None)
    if gpus is None:
        import torch

        gpus = float(torch.cuda.is_available())
    return WorkerPlan(1, 1, 1, cores, cpus=cores, gpus=gpus, task_cpus=0.0, in_process=True)


def connect_for(options: CpuWorkerOptions) -> None:
    """Join or start the cluster that the options need: none for the local executor."""
    if not options.is_local:
        connect()


def largest_node_cpus(options: CpuWorkerOptions) -> float:
    """CPUs of the largest node that the options allow; the requested CPUs where no node is there yet."""
    if options.is_local:
        return float(options.cpus_per_worker or len(sched_getaffinity(0)))
    largest = max((node.get("CPU", 0) for node in live_nodes(parse_labels(options.worker_label))), default=0)
    return largest or options.cpus_per_worker or 1.0


def plan_workers(options: WorkerOptions, weight_bytes: int) -> WorkerPlan:
    """Compare the request with the nodes that exist, or may come. Raises ShoalError that says what to change."""
    labels = parse_labels(options.worker_label)
    nodes, growing = live_nodes(labels), cluster_grows()
    if growing:
        _refuse_unsized(options, weight_bytes)
    else:
        check_labels(labels, nodes)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    if gpus:
        cpus = options.cpus_per_worker or 1.0
        one = WorkerPlan(1, 1, 1, cpus, cpus, gpus, TASK_CPUS_BESIDE_GPU_WORKERS, labels)
    else:
        cores, memory = options.cpus_per_worker or _cores_for_memory(nodes, weight_bytes), worker_memory(weight_bytes)
        one = WorkerPlan(1, 1, 1, cores, WORKER_SHARE * cores, 0.0, TASK_CPUS_BESIDE_CPU_WORKERS, labels, memory)
    places, minimum = sum(map(one.places, nodes)), options.min_workers or 1
    maximum = options.max_workers or max(places, minimum)
    if minimum > maximum:
        raise UsageError(f"--min-workers {minimum} is over --max-workers {maximum}")
    if not growing:
        _refuse_unfit(one, minimum, places, nodes)
    return replace(one, minimum=minimum, initial=min(maximum, max(minimum, places)), maximum=maximum)


def require_explicit_sizes(options: WorkerOptions, weight_bytes: int) -> None:
    """Raises UsageError on a cluster that grows, when the command gives no sizes. For jobs that plan workers late."""
    if not options.is_local and cluster_grows():
        _refuse_unsized(options, weight_bytes)


def _refuse_unsized(options: WorkerOptions, weight_bytes: int) -> None:
    unsized = options.gpus_per_worker == 0 and weight_bytes and not options.cpus_per_worker
    if options.gpus_per_worker is None or options.max_workers is None or unsized:
        raise UsageError(
            "the cluster grows with what a job asks for, and does not say beforehand what its nodes will have. Say "
            "--max-workers, and --gpus-per-worker (1, or 0 for workers on CPUs, with --cpus-per-worker)"
        )


def with_current_nodes(workers: WorkerPlan) -> WorkerPlan:
    """The plan with more initial workers, where nodes have joined since it was made."""
    places = sum(map(workers.places, live_nodes(workers.labels)))
    return replace(workers, initial=max(workers.initial, min(workers.maximum, places)))


def _cores_for_memory(nodes: Sequence[Mapping[str, float]], weight_bytes: int) -> float:
    """One core a worker, more where workers of one core would not fit the node's memory."""
    node = max(nodes, key=lambda n: n.get("CPU", 0), default={})
    fitting = max(1, int(node.get("memory", 0) // worker_memory(weight_bytes)))
    cpus = max(1, int(node.get("CPU", 1)))
    return float(max(1, cpus // min(cpus, fitting)))


def worker_memory(weight_bytes: int) -> int:
    """Bytes one worker is expected to take."""
    return int(weight_bytes * WEIGHTS_FACTOR + WORKER_BASE)


def _refuse_unfit(one: WorkerPlan, minimum: int, places: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises RunError unless one worker, and `minimum` of them, fit the nodes, with room beside each for a task."""
    kinds = describe_nodes(nodes)
    if places == 0 and any(replace(one, memory=0).places(node) for node in nodes):
        raise RunError(
            f"a worker needs about {one.memory / 2**30:.1f} GiB, and no node has as much for tasks ({kinds}). Choose a "
            "smaller model or larger nodes"
        )
    if places == 0:
        wanted = f"{one.gpus:g} GPU and {one.cpus:g} CPU" if one.gpus else f"{one.cpus:g} CPU"
        raise RunError(
            f"no node has {wanted} for a worker and {one.task_cpus:g} CPU for a task beside it. Nodes: {kinds}. "
            "Lower --cpus-per-worker or --gpus-per-worker, or add nodes"
        )
    if minimum > places:
        raise RunError(
            f"--min-workers {minimum}, but the nodes have room for {places} ({kinds}). Lower it, or add nodes"
        )

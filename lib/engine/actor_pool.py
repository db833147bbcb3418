"""A pool of actors that do whole shards, and stay from one stage of a job to the next.

Ray Data starts new processes for each of its runs: seconds, once torch is loaded. Here a stage takes the actors of the stage
before it. This module decides which actors exist; dispatch.py decides which actor gets which shard.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..data.shards import Shard
from .mapper import Receipt, ShardRunner
from .nodes import node_memory
from .workers import WORKER_BASE, WorkerPlan


class LoadError(Exception):
    """A worker cannot load what the stage needs."""


class ShardWorker:
    """The actor. What a mapper has loaded stays until a shard of another stage comes."""

    stage = ""  # reference to the loaded one, in hex digits
    runner: ShardRunner | None = None

    def node(self) -> str:
        """Id of the node that it runs on. An answer means that the actor has started."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def run(self, stage: Sequence[Any], shard: Shard) -> Receipt:
        """Do one shard. stage: a list with a reference to a Stage, which is fetched with the stage's first shard here."""
        import ray

        if self.runner is None or stage[0].hex() != self.stage:
            self.runner = None  # free the last stage's memory before the next one loads
            try:
                self.runner, self.stage = ShardRunner(ray.get(stage[0])), stage[0].hex()
            except Exception as error:
                raise LoadError(f"{type(error).__name__}: {error}") from error
        return self.runner.run(shard)


@dataclass(eq=False)
class PooledActor:
    """A worker of the pool. started: the reference whose answer is its node; batch: number of the `start` that made it.

    It is starting until its node is known, then idle, or busy while it has a shard, or two: the second waits behind the first.
    One that was stopped, that died, or that could not load is no longer in the pool.
    """

    actor: Any
    started: Any
    batch: int
    node: str | None = None
    shards: list[Shard] = field(default_factory=list)


class ActorPool:
    """The actors of a driver, all of one shape: CPUs, GPUs, and the labels of their nodes."""

    def __init__(self) -> None:
        self.actors: list[PooledActor] = []
        self.shape: tuple[Any, ...] = ()
        self.batches = self.failed_starts = 0
        self.last_failed_batch = 0  # `batches` at the time when the last failed start was counted

    def acquire(self, workers: WorkerPlan, shards: int) -> list[PooledActor]:
        """The actors that serve a stage of so many shards: existing ones first, then new ones."""
        wanted = min(workers.maximum, shards)
        self.actors.sort(key=lambda actor: actor.node is None)
        if shape_of(workers) == self.shape:
            self.stop(self.actors[workers.maximum :])
            existing = self.actors[:wanted]
        else:
            existing = self._borrow(workers) if wanted == 1 else []
        if existing:
            self.keep_nodes_of(existing)
        return existing + self.start(wanted - len(existing), workers)

    def _borrow(self, workers: WorkerPlan) -> list[PooledActor]:
        """For a stage of one worker: an actor of another shape whose node has enough CPUs in the hands of idle pool actors."""
        cpus, *rest = self.shape or (0.0,)
        if rest != list(shape_of(workers)[1:]):
            return []
        for node, number in Counter(actor.node for actor in self.actors if actor.node).items():
            memory_of_others = (number - 1) * WORKER_BASE if workers.memory else 0
            if number * cpus >= workers.cpus and workers.memory + memory_of_others <= node_memory(node):
                return [next(actor for actor in self.actors if actor.node == node)]
        return []

    def start(self, number: int, workers: WorkerPlan) -> list[PooledActor]:
        """Start actors, in place of all others where those have another shape. Ray places them when their nodes are there."""
        import ray

        if number <= 0:
            return []
        if shape_of(workers) != self.shape:
            self.stop(self.actors)
        self.shape = shape_of(workers)
        resources: Any = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
        labels = dict(workers.labels) or None
        kind: Any = ray.remote(ShardWorker).options(**resources, label_selector=labels, max_restarts=0)
        handles = [kind.remote() for _ in range(number)]
        self.batches += 1
        actors = [PooledActor(handle, handle.node.remote(), self.batches) for handle in handles]
        self.actors += actors
        return actors

    def keep_nodes_of(self, serving: Sequence[PooledActor]) -> None:
        """Stop actors on nodes where none of `serving` runs, so that the autoscaler can remove those nodes."""
        nodes, kept = {actor.node for actor in serving} - {None}, set(serving)
        self.stop([actor for actor in self.actors if actor not in kept and actor.node not in nodes])

    def stop(self, actors: Sequence[PooledActor]) -> None:
        """End the actors' processes and forget them."""
        stopped = set(actors)
        self.actors = [actor for actor in self.actors if actor not in stopped]
        for actor in stopped:
            import ray  # not for a pool that stayed empty: the local executor does without

            if ray.is_initialized():  # else they have ended with it
                ray.kill(actor.actor)

    def count_failed_start(self, actor: PooledActor) -> int:
        """Failed starts in a row, each of a later `start` than the one before: many at once may be one node's end."""
        if actor.batch > self.last_failed_batch:
            self.last_failed_batch = self.batches
            self.failed_starts += 1
        return self.failed_starts


def shape_of(workers: WorkerPlan) -> tuple[Any, ...]:
    """The resources that an actor asks of Ray, which the next stage must ask alike to take it over."""
    return workers.cpus, workers.gpus, dict(workers.labels)


_shared: ContextVar[ActorPool | None] = ContextVar("actor_pool", default=None)


@contextmanager
def shared_pool() -> Iterator[ActorPool]:
    """One pool for all stages inside the block; without it each stage has its own."""
    if pool := _shared.get():
        yield pool
        return
    pool = ActorPool()
    token = _shared.set(pool)
    try:
        yield pool
    finally:
        pool.stop(pool.actors)
        _shared.reset(token)


def release_shared_pool() -> None:
    """Stop the shared pool's actors before another executor needs their CPUs."""
    if pool := _shared.get():
        pool.stop(pool.actors)

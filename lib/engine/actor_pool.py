"""Workers that do a shard from its reading to its part, and go from one stage of a job to the next.

Ray Data starts new processes for each of its runs: seconds, once torch is loaded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..data.shards import Shard
from ..storage.folder import Folder
from .mapper import Mapper, Receipt, Whole
from .workers import WORKER_BASE, WorkerPlan, node_memory

StageArguments = tuple[Mapper, Folder, Mapping[int, str]]  # of a stage: what is done, where to, and the parts' names


class LoadError(Exception):
    """A worker cannot load what the stage needs."""


class ShardWorker:
    """The actor. What a verb has loaded stays until a shard of another stage comes."""

    def __init__(self) -> None:
        self.stage = -1
        self.whole: Whole | None = None

    def node(self) -> str:
        """Its node's id. The answer says that it is there."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def do(self, stage: int, given: Sequence[Any], shard: Shard) -> Receipt:
        """given: a reference to the stage's Given, fetched by its first shard here."""
        import ray

        if self.whole is None or stage != self.stage:
            self.whole = None  # goes before the next is loaded
            try:
                self.whole, self.stage = Whole(*ray.get(given[0])), stage
            except Exception as error:
                raise LoadError(f"{type(error).__name__}: {error}") from error
        return self.whole.do(shard)


@dataclass(eq=False)
class PooledActor:
    """A worker as the driver knows it. hired: with which call of `hire`; node: None until it answers; holds: shards given to it."""

    actor: Any
    answer: Any
    hired: int
    node: str | None = None
    holds: list[Shard] = field(default_factory=list)


class ActorPool:
    """The workers of a driver, all of one shape: CPUs, GPUs, and the labels of their nodes."""

    def __init__(self) -> None:
        self.members: list[PooledActor] = []
        self.shape: tuple[Any, ...] = ()
        self.hires = self.stillborn = 0
        self.failed = 0  # the last hire of when the last stillborn was counted

    def gather(self, workers: WorkerPlan, shards: int) -> list[PooledActor]:
        """Those that serve a stage: who is there already, and who is hired."""
        want = min(workers.maximum, shards)
        self.members.sort(key=lambda member: member.node is None)
        if shape_of(workers) == self.shape:
            self.dismiss(self.members[workers.maximum :])
            found = self.members[:want]
        else:
            found = self._lent(workers) if want == 1 else []
        if found:
            self.keep_beside(found)
        return found + self.hire(want - len(found), workers)

    def _lent(self, workers: WorkerPlan) -> list[PooledActor]:
        """For a stage of one worker: one whose neighbours idle, where together they have the cores that it asks for."""
        cpus, *rest = self.shape or (0.0,)
        if rest != list(shape_of(workers)[1:]):
            return []
        for node, number in Counter(member.node for member in self.members if member.node).items():
            beside = (number - 1) * WORKER_BASE if workers.memory else 0
            if number * cpus >= workers.cpus and workers.memory + beside <= node_memory(node):
                return [next(member for member in self.members if member.node == node)]
        return []

    def hire(self, number: int, workers: WorkerPlan) -> list[PooledActor]:
        """So many more, in place of all others where these are of another shape. They come when their nodes do."""
        import ray

        if number <= 0:
            return []
        if shape_of(workers) != self.shape:
            self.dismiss(self.members)
        self.shape = shape_of(workers)
        kind: Any = ray.remote(ShardWorker).options(
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            label_selector=dict(workers.labels) or None,
            max_restarts=0,
        )
        actors = [kind.remote() for _ in range(number)]
        self.hires += 1
        hired = [PooledActor(actor, actor.node.remote(), self.hires) for actor in actors]
        self.members += hired
        return hired

    def keep_beside(self, serving: Sequence[PooledActor]) -> None:
        """Dismiss who would keep a node on which none of these is. Beside them the others cost nothing."""
        nodes, kept = {member.node for member in serving} - {None}, set(serving)
        self.dismiss([member for member in self.members if member not in kept and member.node not in nodes])

    def dismiss(self, members: Sequence[PooledActor]) -> None:
        gone = set(members)
        self.members = [member for member in self.members if member not in gone]
        for member in gone:
            import ray

            if ray.is_initialized():  # else they are gone with it
                ray.kill(member.actor)


def shape_of(workers: WorkerPlan) -> tuple[Any, ...]:
    return workers.cpus, workers.gpus, dict(workers.labels)


_kept: ContextVar[ActorPool | None] = ContextVar("crew", default=None)


@contextmanager
def shared_pool() -> Iterator[ActorPool]:
    """Stages within it have their workers in common; without it each has its own."""
    if crew := _kept.get():
        yield crew
        return
    crew = ActorPool()
    token = _kept.set(crew)
    try:
        yield crew
    finally:
        crew.dismiss(crew.members)
        _kept.reset(token)


def release_shared_pool() -> None:
    """Before others need the CPUs: whoever is kept for a next stage goes."""
    if crew := _kept.get():
        crew.dismiss(crew.members)

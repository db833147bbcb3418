"""Workers that do a shard from its reading to its part, and go from one stage of a job to the next.

Verbs with nothing to overlap (Direct) need none of what Ray Data does between steps, and it starts new processes for each of its
runs: seconds, once torch is loaded. Here a shard goes to whoever is free. A worker that dies gives its shards back and another is
hired in its place, so that no shard waits for a node that may never come again.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .errors import RunError
from .plan import Shard
from .stages import Receipt, Verb, Whole
from .storage import Folder
from .workers import WORKER_BASE, Workers, node_memory

DEATHS = 3  # workers a shard may see die in one round before it is left for the next
DIED = "its process died each time"
STILLBORN = 3  # workers that cannot start, one after the other: the run ends
Given = tuple[Verb, Folder, Mapping[int, str]]  # of a stage: what is done, where to, and the parts' names
_stages = count()


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
            self.whole, self.stage = Whole(*ray.get(given[0])), stage
        return self.whole.do(shard)


@dataclass(eq=False)
class _Member:
    """A worker as the driver knows it. node: None until it answers; holds: the shards that were given to it."""

    actor: Any
    answer: Any
    node: str | None = None
    holds: list[Shard] = field(default_factory=list)


class Crew:
    """The workers of a driver, all of one shape: CPUs, GPUs, and the labels of their nodes."""

    def __init__(self) -> None:
        self.members: list[_Member] = []
        self.shape: tuple[Any, ...] = ()
        self.stillborn = 0

    def gather(self, workers: Workers, shards: int) -> list[_Member]:
        """Those that serve a stage: who is there already, and who is hired."""
        want = min(workers.maximum, shards)
        self.members.sort(key=lambda member: member.node is None)
        if _shape(workers) == self.shape:
            self.dismiss(self.members[workers.maximum :])
            found = self.members[:want]
        else:
            found = self._lent(workers) if want == 1 else []
        if found:
            self.keep_beside(found)
        return found + self.hire(want - len(found), workers)

    def _lent(self, workers: Workers) -> list[_Member]:
        """For a stage of one worker: one whose neighbours idle, where together they have the cores that it asks for."""
        cpus, *rest = self.shape or (0.0,)
        if rest != list(_shape(workers)[1:]):
            return []
        for node, number in Counter(member.node for member in self.members if member.node).items():
            beside = (number - 1) * WORKER_BASE if workers.memory else 0
            if number * cpus >= workers.cpus and workers.memory + beside <= node_memory(node):
                return [next(member for member in self.members if member.node == node)]
        return []

    def hire(self, number: int, workers: Workers) -> list[_Member]:
        """So many more, in place of all others where these are of another shape. They come when their nodes do."""
        import ray

        if number <= 0:
            return []
        if _shape(workers) != self.shape:
            self.dismiss(self.members)
        self.shape = _shape(workers)
        kind: Any = ray.remote(ShardWorker).options(
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            label_selector=dict(workers.labels) or None,
            max_restarts=0,
        )
        actors = [kind.remote() for _ in range(number)]
        hired = [_Member(actor, actor.node.remote()) for actor in actors]
        self.members += hired
        return hired

    def keep_beside(self, serving: Sequence[_Member]) -> None:
        """Dismiss who would keep a node on which none of these is. Beside them the others cost nothing."""
        nodes, kept = {member.node for member in serving}, set(serving)
        self.dismiss([member for member in self.members if member not in kept and member.node not in nodes])

    def dismiss(self, members: Sequence[_Member]) -> None:
        gone = set(members)
        self.members = [member for member in self.members if member not in gone]
        for member in gone:
            import ray

            if ray.is_initialized():  # else they are gone with it
                ray.kill(member.actor)


def _shape(workers: Workers) -> tuple[Any, ...]:
    return workers.cpus, workers.gpus, dict(workers.labels)


_kept: ContextVar[Crew | None] = ContextVar("crew", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Stages within it have their workers in common; without it each has its own."""
    if _kept.get() is not None:
        yield
        return
    crew = Crew()
    token = _kept.set(crew)
    try:
        yield
    finally:
        _kept.reset(token)
        crew.dismiss(crew.members)


def stand_aside() -> None:
    """Before others need the CPUs: whoever is kept for a next stage goes."""
    if crew := _kept.get():
        crew.dismiss(crew.members)


def perform(given: Given, shards: Sequence[Shard], workers: Workers, in_flight: int) -> Iterator[Receipt]:
    """A receipt of each shard, in no order. in_flight: shards that a worker has at once, one of them being done.

    Raises RunError where no worker can start.
    """
    with together():
        crew = _kept.get()
        assert crew is not None
        stage = _Stage(crew, given, shards, workers, in_flight)
        try:
            yield from stage.receipts()
        finally:
            crew.dismiss(stage.busy())


class _Stage:
    """Shards on their way through a crew."""

    def __init__(self, crew: Crew, given: Given, shards: Sequence[Shard], workers: Workers, in_flight: int) -> None:
        import ray

        self.crew, self.workers, self.in_flight = crew, workers, in_flight
        self.number, self.given = next(_stages), [ray.put(given)]  # in a list Ray does not fetch it for each call
        self.todo, self.deaths = deque(shards), Counter[int]()
        self.serving = crew.gather(workers, len(shards))
        self.calls = {member.answer: member for member in self.serving if member.node is None}

    def busy(self) -> list[_Member]:
        return [member for member in self.serving if member.holds]

    def receipts(self) -> Iterator[Receipt]:
        import ray

        while self.todo or self.busy():
            self._give()
            (call, *_), _ = ray.wait(list(self.calls), num_returns=1)
            member = self.calls.pop(call)
            try:
                said = ray.get(call)
            except ray.exceptions.RayError as error:
                yield from self._lose(member, error)
                continue
            if isinstance(said, Receipt):
                member.holds = [shard for shard in member.holds if shard.number != said.shard]
                self.crew.stillborn = 0
                yield said
            else:
                member.node = said

    def _give(self) -> None:
        # The last shards each have a worker: one that waits behind another would leave others idle.
        most = self.in_flight if len(self.todo) > len(self.serving) else 1
        for member in self.serving if self.todo else ():
            while self.todo and member.node and len(member.holds) < most:
                shard = self.todo.popleft()
                member.holds.append(shard)
                self.calls[member.actor.do.remote(self.number, self.given, shard)] = member
        if not self.todo:
            self.crew.keep_beside(self.busy())
            self._forget_the_gone()

    def _forget_the_gone(self) -> None:
        there = set(self.crew.members)
        self.serving = [member for member in self.serving if member in there]
        self.calls = {call: member for call, member in self.calls.items() if member in there}

    def _lose(self, member: _Member, error: Exception) -> Iterator[Receipt]:
        """Give a lost worker's shards to others, last, where each is alone with its worker; those that lost too many are done."""
        from ray.exceptions import RayTaskError

        unable = member.node is None or isinstance(error, RayTaskError)
        self.crew.stillborn += unable
        if self.crew.stillborn >= STILLBORN:
            raise RunError(f"the workers could not run: {_last_words(error)}") from error
        for shard in member.holds:
            self.deaths[shard.number] += not unable
            if self.deaths[shard.number] > DEATHS:
                yield Receipt(shard.number, failure=f"{DIED} (Ray's last error: {_last_words(error)})")
            else:
                self.todo.append(shard)
        member.holds = []
        self.crew.dismiss([member])
        self._forget_the_gone()
        want = min(self.workers.maximum, len(self.todo) + len(self.busy()))
        hired = self.crew.hire(want - len(self.serving), self.workers)
        self.serving += hired
        self.calls |= {each.answer: each for each in hired}


def _last_words(error: Exception) -> str:
    """What an error of Ray says in a line: of a call that raised, the first of its cause; of a worker that is gone, the last."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    return f"{type(cause or error).__name__}: {(lines or ['nothing'])[0 if cause else -1]}"[:500]

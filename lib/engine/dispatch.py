"""A stage's shards, each given to whoever of a crew is free, until all have a receipt.

For verbs with nothing to overlap (Direct), which need none of what Ray Data does between steps. A worker that dies gives its shards
back and another is hired in its place, so that no shard waits for a node that may never come again.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from ..data.shards import Shard
from ..errors import RunError
from .actor_pool import ActorPool, LoadError, PooledActor, StageArguments, shape_of, shared_pool
from .mapper import Receipt
from .workers import WorkerPlan

MAX_ACTOR_DEATHS = 3  # workers a shard may see die in one round before it is left for the next
DIED = "its process died each time"
MAX_FAILED_STARTS = 5  # workers that cannot start, one after the other: the run ends
IDLE_SECONDS = 30.0  # seconds that a worker idles beside the last ones at work
_stages = count()


def dispatch(given: StageArguments, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Iterator[Receipt]:
    """A receipt of each shard, in no order. in_flight: shards that a worker has at once, one of them being done.

    Raises RunError where no worker can start, and for other errors of Ray.
    """
    import ray

    with shared_pool() as crew:
        try:
            shift = _Dispatcher(crew, given, shards, workers, in_flight)
            try:
                yield from shift.receipts()
            finally:
                crew.dismiss(shift.busy())
        except ray.exceptions.RayError as error:
            raise RunError(f"the workers could not run: {_last_words(error)}") from error


class _Dispatcher:
    """Shards on their way through a crew."""

    def __init__(
        self, crew: ActorPool, given: StageArguments, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int
    ) -> None:
        import ray

        self.crew, self.workers, self.in_flight = crew, workers, in_flight
        self.number, self.given = next(_stages), [ray.put(given)]  # in a list Ray does not fetch it for each call
        self.todo, self.deaths = deque(shards), Counter[int]()
        self.serving = crew.gather(workers, len(shards))
        self.calls: dict[Any, tuple[PooledActor, Shard | None]] = {}
        self._await(self.serving)

    def _await(self, hired: Sequence[PooledActor]) -> None:
        self.calls |= {member.answer: (member, None) for member in hired if member.node is None}

    def busy(self) -> list[PooledActor]:
        return [member for member in self.serving if member.holds]

    def receipts(self) -> Iterator[Receipt]:
        import ray

        while self.todo or self.busy():
            self._give()
            self._dismiss_the_useless()
            done, _ = ray.wait(list(self.calls), num_returns=1, timeout=IDLE_SECONDS)
            if not done:
                self._make_room()
                continue
            member, shard = self.calls.pop(done[0])
            try:
                said = ray.get(done[0])
            except ray.exceptions.RayError as error:
                yield from self._failed(member, shard, error)
                continue
            if shard is None:
                member.node = said
                continue
            member.holds.remove(shard)
            self.crew.stillborn = 0
            yield said

    def _give(self) -> None:
        """To each a shard, and behind it another, unless these are the last, or it has seen a worker die: such ones stay alone."""
        for depth in range(self.in_flight):
            for member in self.serving:
                if not self.todo or (
                    depth and (len(self.todo) <= len(self.serving) or self.deaths[self.todo[0].number])
                ):
                    return
                if member.node and len(member.holds) <= depth:
                    shard = self.todo.popleft()
                    member.holds.append(shard)
                    self.calls[member.actor.do.remote(self.number, self.given, shard)] = member, shard

    def _dismiss_the_useless(self) -> None:
        """Of those that are to come more than there are shards; at the end who would keep a node on which nothing is done."""
        coming = [member for member in self.serving if not member.node]
        self.crew.dismiss(coming[len(self.todo) :])
        if not self.todo:
            self.crew.keep_beside(self.busy())
        self._forget_the_gone()

    def _make_room(self) -> None:
        """Who has idled so long makes room for others, unless its cores are lent."""
        if not self.todo and shape_of(self.workers) == self.crew.shape:
            self.crew.dismiss([member for member in self.crew.members if not member.holds])

    def _forget_the_gone(self) -> None:
        there = set(self.crew.members)
        self.serving = [member for member in self.serving if member in there]
        self.calls = {call: about for call, about in self.calls.items() if about[0] in there}

    def _failed(self, member: PooledActor, shard: Shard | None, error: Exception) -> Iterator[Receipt]:
        """What has befallen a call: nothing that the worker had not outlived, or all shards that it held."""
        from ray.exceptions import RayTaskError

        unable = shard is None or isinstance(getattr(error, "cause", None), LoadError)
        if shard and isinstance(error, RayTaskError) and not unable:
            member.holds.remove(shard)
            yield Receipt(shard.number, failure=_last_words(error))
            return
        if unable:
            self._count_unable(member, error)
        yield from self._given_back(member.holds, error, died=not unable)
        member.holds = []
        # Were its node lost, the others on it, that idle, would each cost a shard a death.
        beside = [each for each in self.crew.members if each.node == member.node and not each.holds]
        self.crew.dismiss([member, *(beside if member.node else [])])
        self._forget_the_gone()
        want = min(self.workers.maximum, len(self.todo) + len(self.busy()))
        hired = self.crew.hire(want - len(self.serving), self.workers)
        self.serving += hired
        self._await(hired)

    def _count_unable(self, member: PooledActor, error: Exception) -> None:
        """Raises RunError after so many, each hired after the last had failed: many at once may be one node's end."""
        if member.hired > self.crew.failed:
            self.crew.failed = self.crew.hires
            self.crew.stillborn += 1
        if self.crew.stillborn >= MAX_FAILED_STARTS:
            raise RunError(f"the workers could not run: {_last_words(error)}") from error

    def _given_back(self, shards: Sequence[Shard], error: Exception, died: bool) -> Iterator[Receipt]:
        """A lost worker's shards, to be done last; a receipt of those that lost too many."""
        for shard in shards:
            self.deaths[shard.number] += died
            if self.deaths[shard.number] > MAX_ACTOR_DEATHS:
                yield Receipt(shard.number, failure=f"{DIED} (Ray's last error: {_last_words(error)})")
            else:
                self.todo.append(shard)


def _last_words(error: Exception) -> str:
    """What an error of Ray says in a line: of a call that raised, the first of its cause; of a worker that is gone, the last."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    name = "" if isinstance(cause, LoadError) else f"{type(cause or error).__name__}: "
    return f"{name}{(lines or ['nothing'])[0 if cause else -1]}"[:500]

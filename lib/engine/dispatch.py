"""The executor on the actor pool, for fused mappers: each shard goes to an actor that is free, until all have a receipt.

An actor that dies gives its shards back and another is started in its place, so that no shard waits for a node that may never
come again. A shard that was in flight when actors died is tried alone, and left for the next round after MAX_ACTOR_DEATHS.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.shards import Shard
from ..errors import RunError
from .actor_pool import ActorPool, LoadError, PooledActor, shape_of, shared_pool
from .mapper import Receipt, Stage
from .workers import WorkerPlan

MAX_ACTOR_DEATHS = 3  # a shard may see so many in one round
DIED = "its process died each time"
MAX_FAILED_STARTS = 5  # in a row; then the run ends
IDLE_SECONDS = 30.0  # after which idle actors are stopped while the last shards are in flight


def run_shards(stage: Stage, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Iterator[Receipt]:
    """A receipt of each shard, in no order. in_flight: shards that an actor has at once. Raises RunError for errors of Ray."""
    import ray

    with shared_pool() as pool:
        try:
            dispatcher = _Dispatcher(pool, stage, shards, workers, in_flight)
            try:
                yield from dispatcher.receipts()
            finally:
                pool.stop(dispatcher.busy())
        except ray.exceptions.RayError as error:
            raise RunError(f"the workers could not run: {_short_message(error)}") from error


class _Dispatcher:
    """The shards of one stage, and the actors that serve it."""

    def __init__(self, pool: ActorPool, stage: Stage, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int):
        import ray

        self.pool, self.workers, self.in_flight = pool, workers, in_flight
        self.stage = [ray.put(stage)]  # in a list Ray does not fetch it for each call
        self.todo, self.deaths = deque(shards), Counter[int]()
        self.serving = pool.acquire(workers, len(shards))
        self.calls: dict[Any, tuple[PooledActor, Shard | None]] = {}  # of a start no shard
        self._await_starts(self.serving)

    def _await_starts(self, actors: Sequence[PooledActor]) -> None:
        self.calls |= {actor.started: (actor, None) for actor in actors if actor.node is None}

    def busy(self) -> list[PooledActor]:
        return [actor for actor in self.serving if actor.shards]

    def receipts(self) -> Iterator[Receipt]:
        """Hand out shards and yield receipts, until all are here."""
        import ray

        while self.todo or self.busy():
            self._assign()
            self._stop_unneeded()
            done, _ = ray.wait(list(self.calls), num_returns=1, timeout=IDLE_SECONDS)
            if not done:
                self._stop_idle()
                continue
            actor, shard = self.calls.pop(done[0])
            try:
                answer = ray.get(done[0])
            except ray.exceptions.RayError as error:
                yield from self._failed(actor, shard, error)
                continue
            if shard is None:
                actor.node = answer
                continue
            actor.shards.remove(shard)
            self.pool.failed_starts = 0
            yield answer

    def _assign(self) -> None:
        """Give each actor a shard, and another behind it. The last shards, and those that saw an actor die, stay alone."""
        for depth in range(self.in_flight):
            for actor in self.serving:
                last = len(self.todo) <= len(self.serving)
                if not self.todo or (depth and (last or self.deaths[self.todo[0].number])):
                    return
                if actor.node and len(actor.shards) <= depth:
                    shard = self.todo.popleft()
                    actor.shards.append(shard)
                    self.calls[actor.actor.run.remote(self.stage, shard)] = actor, shard

    def _stop_unneeded(self) -> None:
        """Stop starting actors when there are more of them than shards left, and at the end idle ones on nodes without a busy one."""
        starting = [actor for actor in self.serving if actor.node is None]
        self.pool.stop(starting[len(self.todo) :])
        if not self.todo:
            self.pool.keep_nodes_of(self.busy())
        self._forget_stopped()

    def _stop_idle(self) -> None:
        """Stop actors that were idle for IDLE_SECONDS, unless a borrowed actor is using their CPUs."""
        if not self.todo and shape_of(self.workers) == self.pool.shape:
            self.pool.stop([actor for actor in self.pool.actors if not actor.shards])

    def _forget_stopped(self) -> None:
        alive = set(self.pool.actors)
        self.serving = [actor for actor in self.serving if actor in alive]
        self.calls = {call: about for call, about in self.calls.items() if about[0] in alive}

    def _failed(self, actor: PooledActor, shard: Shard | None, error: Exception) -> Iterator[Receipt]:
        """Handle a failed call. An error that the actor survived fails its shard; a lost actor gives all its shards back."""
        from ray.exceptions import RayTaskError

        cannot_load = shard is None or isinstance(getattr(error, "cause", None), LoadError)
        if shard and isinstance(error, RayTaskError) and not cannot_load:
            actor.shards.remove(shard)
            yield Receipt(shard.number, failure=_short_message(error))
            return
        if cannot_load and self.pool.count_failed_start(actor) >= MAX_FAILED_STARTS:
            raise RunError(f"the workers could not run: {_short_message(error)}") from error
        yield from self._give_back(actor.shards, error, died=not cannot_load)
        actor.shards = []
        self._replace(actor)

    def _replace(self, actor: PooledActor) -> None:
        """Stop a lost actor, and the idle ones of its node: were the node lost, each would cost a shard a death. Start others."""
        idle_beside = [each for each in self.pool.actors if each.node == actor.node and not each.shards]
        self.pool.stop([actor, *(idle_beside if actor.node else [])])
        self._forget_stopped()
        wanted = min(self.workers.maximum, len(self.todo) + len(self.busy()))
        started = self.pool.start(wanted - len(self.serving), self.workers)
        self.serving += started
        self._await_starts(started)

    def _give_back(self, shards: Sequence[Shard], error: Exception, died: bool) -> Iterator[Receipt]:
        """Queue a lost actor's shards last; a receipt of those that saw too many actors die."""
        for shard in shards:
            self.deaths[shard.number] += died
            if self.deaths[shard.number] > MAX_ACTOR_DEATHS:
                yield Receipt(shard.number, failure=f"{DIED} (Ray's last error: {_short_message(error)})")
            else:
                self.todo.append(shard)


def _short_message(error: Exception) -> str:
    """One line of an error of Ray: the first line of a call's cause, or the last line where the actor was lost."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    name = "" if isinstance(cause, LoadError) else f"{type(cause or error).__name__}: "
    return f"{name}{(lines or ['nothing'])[0 if cause else -1]}"[:500]

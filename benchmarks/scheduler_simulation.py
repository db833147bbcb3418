"""The scheduler loop of a run on thousands of spot GPUs, simulated event by event: what the GPUs' time goes into.

A driver is a loop: each turn takes the receipts that have come, sends shards to workers with fewer than two, and ends the wave when
all of it is done. Turns and shards cost what `scheduler_costs` measured. A worker works on its shards one after the other; a lost
one keeps them until it is up again on a new node, as Ray does, or on a GPU that the end of the wave left idle. Slices share nothing,
so each is simulated alone.
"""

import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import click

from lib.cli.options import command
from lib.cli.units import format_duration

IN_FLIGHT = 2  # shards a worker
WAIT = 0.1  # seconds that Ray Data waits for tasks in each turn
ACTORS_A_SECOND = 550  # that a cluster starts, of Ray's release test with 10,000
USES = {
    "work": "work",
    "thrown": "thrown away",
    "load": "starting",
    "driver": "waits for driver",
    "tail": "ends of waves",
}


def option(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run, and what things take."""

    documents: float = option(1e10, "Rows of the corpus.")
    tokens: float = option(150, "Tokens a document.")
    rate: float = option(500_000, "Tokens a second and GPU.")
    gpus: int = option(2000, "GPUs of all slices together.")
    gpus_a_node: int = option(8, "GPUs that are lost together.")
    slices: int = option(1, "Drivers, each with its share of shards and GPUs.")
    shard_rows: int = option(65_536, "Rows a shard.")
    wave: int = option(4000, "Shards between two starts of the workers, at least.")
    wave_a_worker: int = option(16, "And at least so many for each worker.")
    loss: float = option(0.05, "Losses a node and hour.")
    node_start: float = option(180, "Seconds from a loss, or the first demand, to a new node.")
    load: float = option(60, "Seconds from a worker's start to its first shard.")
    grow: int = option(0, "GPUs that a driver asks for at a time. 0: all at once.")
    spread: float = option(0.1, "Shards take so much more or less than the mean.")
    shard_ms: float = option(14, "CPU time of the driver a shard, ms.")
    turn_ms: float = option(5, "The same a turn of its loop.")
    actor_ms: float = option(0.065, "The same a turn and actor.")
    wait: float = option(WAIT, "Seconds a turn waits for tasks.")
    seed: int = option(0, "Of losses and of the spread.")

    @property
    def shards(self) -> int:
        return math.ceil(self.documents / self.shard_rows)

    @property
    def seconds(self) -> float:
        """Of a GPU a shard."""
        return self.shard_rows * self.tokens / self.rate


class Gpu:
    """A place for a worker: its state (a key of USES, or "gone"), the shards it was sent, what its driver knows of it."""

    __slots__ = ("life", "place", "queue", "sent", "since", "state")

    def __init__(self, place: int):
        self.place, self.state, self.since = place, "gone", 0.0
        self.queue: deque[int] = deque()
        self.sent = 0  # shards without a receipt
        self.life = 0  # events of an earlier one are void

    @property
    def up(self) -> bool:
        return self.state not in ("gone", "load")


class Slice:
    """One driver and its GPUs. done: shards as their receipts came; uses: GPU seconds; busy: seconds of its turns."""

    def __init__(self, scene: Scene, shards: int, gpus: int, seed: int):
        self.scene, self.random = scene, random.Random(seed)
        self.gpus = [Gpu(place) for place in range(gpus)]
        self.uses = dict.fromkeys(USES, 0.0)
        self.todo, self.wave, self.wave_left = deque(range(shards)), deque[int](), 0
        self.done: list[int] = []
        self.receipts: list[tuple[Gpu, int]] = []
        self.free: list[deque[Gpu]] = [deque() for _ in range(IN_FLIGHT)]  # by shards sent; some no longer so
        self.busy = self.now = self.ready = 0.0  # ready: when the next turn can begin
        self.turning = False
        self.order, self.events = count(), list[tuple[float, int, Callable, tuple[Any, ...]]]()
        self.period = scene.wait + (scene.turn_ms + scene.actor_ms * gpus) / 1e3

    def run(self) -> "Slice":
        for gpu in self.gpus:
            step = gpu.place // self.scene.grow if self.scene.grow else 0
            self._at(self.scene.node_start * (1 + step), self._arrive, gpu)
        for node in self.gpus[:: self.scene.gpus_a_node] if self.scene.loss else []:
            self._at(self._life(), self._lose, node)
        self._begin_wave()
        while self.events and (self.wave_left or self.todo):
            self.now, _, what, values = heapq.heappop(self.events)
            what(*values)
        for gpu in self.gpus:
            self._turn_to(gpu, "gone")
        return self

    def _at(self, when: float, what: Callable, *values: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), what, values))

    def _life(self) -> float:
        return self.now + self.random.expovariate(self.scene.loss / 3600)

    def _turn_to(self, gpu: Gpu, state: str) -> None:
        if gpu.state != "gone":
            self.uses[gpu.state] += max(0.0, self.now - gpu.since)
        gpu.state, gpu.since = state, self.now

    def _idle(self) -> str:
        return "driver" if self.wave else "tail"

    # what befalls a GPU

    def _arrive(self, gpu: Gpu) -> None:
        self._start(gpu, 0.0)

    def _start(self, gpu: Gpu, later: float) -> None:
        gpu.life += 1
        self._turn_to(gpu, "load")
        self._at(self.now + later + self.scene.load, self._loaded, gpu, gpu.life)

    def _loaded(self, gpu: Gpu, life: int) -> None:
        if life == gpu.life:
            self._turn_to(gpu, self._idle())
            if gpu.sent < IN_FLIGHT:
                self.free[gpu.sent].append(gpu)
            self._work(gpu)
            self._wake()

    def _reach(self, gpu: Gpu, shard: int) -> None:
        gpu.queue.append(shard)
        if gpu.up and gpu.state != "work":
            self._work(gpu)

    def _work(self, gpu: Gpu) -> None:
        if not gpu.queue:
            self._turn_to(gpu, self._idle())
            return
        self._turn_to(gpu, "work")
        seconds = self.scene.seconds * (1 + self.scene.spread * self.random.uniform(-1, 1))
        self._at(self.now + seconds, self._finish, gpu, gpu.life)

    def _finish(self, gpu: Gpu, life: int) -> None:
        if life == gpu.life:
            self.receipts.append((gpu, gpu.queue.popleft()))
            self._work(gpu)
            self._wake()

    def _lose(self, node: Gpu) -> None:
        for gpu in self.gpus[node.place : node.place + self.scene.gpus_a_node]:
            if gpu.state == "gone":
                continue  # not there yet; its arrival is on the list
            if gpu.state == "work":
                self.uses["thrown"] += self.now - gpu.since
                gpu.since = self.now
            self._turn_to(gpu, "gone")
            gpu.life += 1
            self._at(self.now + self.scene.node_start, self._arrive, gpu)
        self._at(self.scene.node_start + self._life(), self._lose, node)

    # the driver

    def _wake(self) -> None:
        """A turn when the loop comes round."""
        if not self.turning:
            self.turning = True
            late = self.now - self.ready
            rounds = math.ceil(late / self.period) if late > 0 and self.period else 0
            self._at(max(self.now, self.ready + rounds * self.period), self._turn)

    def _turn(self) -> None:
        self.turning, began = False, self.now
        half = self.scene.shard_ms / 2e3  # to send a shard, and to take its receipt
        cost = self.period - self.scene.wait + half * len(self.receipts)
        for gpu, shard in self.receipts:
            self.done.append(shard)
            gpu.sent -= 1
            self.free[gpu.sent].append(gpu)
        self.wave_left -= len(self.receipts)
        self.receipts.clear()
        for gpu in self._places():
            cost += half
            self._at(began + cost, self._reach, gpu, self.wave.popleft())
            if not self.wave:
                self._no_more()
        self.busy += cost
        self.ready = began + cost + self.scene.wait
        if not self.wave_left and self.todo:
            self._begin_wave()
        elif not self.wave and self._rescue():
            self._wake()

    def _places(self) -> Iterator[Gpu]:
        """Workers for the shards that are left, the least busy first."""
        for sent, free in enumerate(self.free):
            while free and self.wave:
                gpu = free.popleft()
                if gpu.sent == sent and gpu.up:
                    gpu.sent += 1
                    if gpu.sent < IN_FLIGHT:
                        self.free[gpu.sent].append(gpu)
                    yield gpu

    def _no_more(self) -> None:
        """Whoever is idle now waits for the end of the wave."""
        for gpu in self.gpus:
            if gpu.state == "driver":
                self._turn_to(gpu, "tail")

    def _rescue(self) -> bool:
        """One idle worker a turn makes room for one whose node is lost. Whether there is another to be tried."""
        lost = next((gpu for gpu in self.gpus if gpu.state == "gone" and 0 < gpu.sent == len(gpu.queue)), None)
        idle = next((gpu for gpu in self.gpus if gpu.state == "tail" and not gpu.sent), None)
        if lost is None or idle is None:
            return False
        idle.queue, lost.queue, idle.sent, lost.sent = lost.queue, idle.queue, lost.sent, idle.sent
        self._start(idle, 0.0)
        return True

    def _begin_wave(self) -> None:
        """Every worker is started anew, one after the other."""
        length = max(self.scene.wave, self.scene.wave_a_worker * len(self.gpus))
        self.wave.extend(self.todo.popleft() for _ in range(min(length, len(self.todo))))
        self.wave_left = len(self.wave)
        for free in self.free:
            free.clear()
        for gpu in self.gpus:
            if gpu.state != "gone":
                self._start(gpu, (gpu.place + 1) / ACTORS_A_SECOND)


def share(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def simulate(scene: Scene) -> list[Slice]:
    sizes = zip(share(scene.shards, scene.slices), share(scene.gpus, scene.slices), strict=True)
    return [Slice(scene, *size, scene.seed * 1000 + number).run() for number, size in enumerate(sizes)]


def told(scene: Scene) -> list[str]:
    """Finish, GPU hours, the busiest driver's share of the time, and what the GPUs' time went into."""
    slices = simulate(scene)
    uses = {use: sum(each.uses[use] for each in slices) for use in USES}
    total = sum(uses.values())
    busy = max(each.busy / each.now for each in slices)
    finish = format_duration(max(each.now for each in slices))
    return [finish, f"{total / 3600:,.0f}", f"{busy:.0%}", *(f"{value / total:.1%}" for value in uses.values())]


def table(scene: Scene, changes: Sequence[dict[str, Any]]) -> None:
    """A line for each change of the scene."""
    heads = ["", "finish", "GPU hours", "driver busy", *USES.values()]
    click.echo(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for change in changes:
        name = ", ".join(f"{key.replace('_', '-')} {value:,}" for key, value in change.items()) or "as told"
        click.echo(f"| {' | '.join([name, *told(replace(scene, **change))])} |")


@command(Scene, "scheduler_simulation.py", "The shortest line: python -m benchmarks.scheduler_simulation --slices 1")
def main(scene: Scene) -> int:
    """Print what the run takes, then what changes with each setting, then with more GPUs and one driver."""
    click.echo(
        f"{scene.shards:,} shards of {scene.seconds:.1f} GPU seconds, {scene.gpus / scene.seconds:.1f} of them a second"
    )
    few = {"wave": 200_000}  # what is left when no wave ends
    table(scene, [{}, {"loss": 0.0}, {"loss": 0.5}, {"grow": 32}, {"load": 180.0}])
    table(scene, [{"slices": n} for n in (2, 4, 8, 16, 32)] + [{"slices": 16, "grow": 32}, {"slices": 16, "loss": 0.5}])
    table(scene, [{"wave_a_worker": n} for n in (2, 8, 32, 100)] + [{"shard_rows": n} for n in (16_384, 262_144)])
    table(scene, [few | {"gpus": n} for n in (250, 500, 1000, 1500, 3000)] + [few | {"shard_rows": 262_144}])
    table(scene, [{"rate": 100_000.0} | change for change in ({}, {"slices": 4}, {"slices": 16})])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the driver spends on a shard and on a turn of Ray Data's loop, by the number of actors, on real Ray.

The mapper does nothing: its first shards end at once, the others sleep as if a GPU worked on them, so that turns with many shards and
turns with few are seen at each number of actors. GPUs are logical ones, so that the three steps are those of GPU workers. Of each
turn the CPU seconds are known, and the shards that moved; least squares over all turns divides them. Each run is its own process.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import pyarrow as pa

from benchmarks.process import run_python
from benchmarks.reporting import machine, spread
from lib.cli.progress import Progress
from lib.data.shards import PLAN_SCHEMA, Shard
from lib.engine.cluster import connect
from lib.engine.executor import execute
from lib.engine.mapper import Result, Tables
from lib.engine.planner import FixedPlanner
from lib.engine.run import Run, missing
from lib.engine.workers import WorkerOptions, WorkerPlan, WorkerRequest
from lib.storage.folder import Folder

RATE = 8.0  # shards a second while they sleep
STEPS = 3  # tasks a shard: read, work, publish


@dataclass(frozen=True)
class Idle:
    """A mapper that takes time and computes nothing. at_once: shards that end at once; seconds: of the others, on average."""

    at_once: int
    seconds: float

    def read(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        return {"rows": pa.table({"shard": [shard.number]})}, {}

    def load(self) -> Callable[[Tables], Tables]:
        return self._sleep

    def _sleep(self, tables: Tables) -> Tables:
        number = tables["rows"]["shard"][0].as_py()
        if number >= self.at_once:
            time.sleep(self.seconds * (0.5 + number * 0.618 % 1))  # not all at the same moment
        return tables

    def to_result(self, shard: Shard, tables: Tables) -> Result:
        return Result(tables["rows"])


@dataclass
class Turn:
    """One step of Ray Data's loop."""

    actors: int
    tasks: int  # that were sent or came back
    thread: float  # CPU seconds of its thread
    began: float  # CPU seconds of the process until then


@dataclass
class Costs:
    """CPU milliseconds of the driver: of the thread of Ray Data's loop, and of the whole process."""

    shard_thread: float
    shard: float
    turn_thread: float
    turn: float


@contextmanager
def watched(turns: list[Turn]) -> Iterator[None]:
    """Every step of the loop leaves a Turn; private names of Ray 2.60."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    step = StreamingExecutor._scheduling_loop_step

    def timed(executor: Any, topology: Any) -> bool:
        began, thread, before = time.process_time(), time.thread_time(), _tasks(topology)
        going = step(executor, topology)
        pools = [pool for op in topology for pool in op.get_autoscaling_actor_pools()]
        running = sum(pool.num_running_actors() for pool in pools)
        turns.append(Turn(running, _tasks(topology) - before, time.thread_time() - thread, began))
        return going

    with patch.object(StreamingExecutor, "_scheduling_loop_step", timed):
        yield


def _tasks(topology: Any) -> int:
    return sum(op.metrics.num_tasks_submitted + op.metrics.num_tasks_finished for op in topology)


def shards_of(count: int) -> tuple[pa.Table, pa.Schema]:
    """The plan of shards whose files do not exist."""
    same = {
        "path": "none",
        "name": "none",
        "start": 0,
        "stop": 1,
        "rows": 1,
        "size": 1,
        "tag": "",
        "error": None,
        "source": None,
    }
    return pa.Table.from_pylist([{"shard": i, **same} for i in range(count)], PLAN_SCHEMA), pa.schema([])


def measure(actors: int, at_once: int, asleep: int) -> Costs:
    """One run on a Ray of its own."""
    import ray

    os.environ |= {
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    ray.init(
        "local",
        num_cpus=4 + actors // 50,
        num_gpus=actors,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**28,
    )
    connect()
    workers = WorkerPlan(actors, actors, actors, cores=1, cpus=0.01, gpus=1.0, task_cpus=1.0)
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as root, watched(turns):
        folder = Folder(root)
        folder.probe()
        planner = FixedPlanner(lambda: shards_of(at_once + asleep), WorkerRequest(WorkerOptions()))
        run = Run.open(folder, {"job": "idle"}, planner, {})
        execute(Idle(at_once, actors / RATE), run, workers, Progress(at_once + asleep), missing(run))
    return fitted(turns, actors)


def fitted(turns: Sequence[Turn], actors: int) -> Costs:
    """`turn + shard * shards` by least squares, over the turns in which every actor runs."""
    process = np.diff([turn.began for turn in turns]) * 1e3
    running = [i for i, turn in enumerate(turns[:-1]) if turn.actors == actors]
    shards = [turns[i].tasks / 2 / STEPS for i in running]
    turn_thread, shard_thread = line(shards, [turns[i].thread * 1e3 for i in running])
    turn, shard = line(shards, process[running])
    return Costs(shard_thread, shard, turn_thread, turn)


def line(x: Sequence[float], y: Any) -> tuple[float, float]:
    """The straight line through (x, y): its value at 0, and its slope."""
    slope, start = np.polyfit(x, y, 1)
    return float(start), float(slope)


@click.command()
@click.option("--actors", default="4,12,36", show_default=True, help="Numbers of actors, with commas between.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--at-once", default=200, show_default=True, help="Shards that end at once.")
@click.option("--asleep", default=100, show_default=True, help=f"Shards that sleep, {RATE:g} a second.")
@click.option("--one", type=int, hidden=True, help="One run with so many actors, as JSON.")
def main(actors: str, rounds: int, at_once: int, asleep: int, one: int | None) -> None:
    """Print the costs by number of actors, median (least - most) of the rounds, and the line through them."""
    if one:
        print(json.dumps(asdict(measure(one, at_once, asleep))))
        return
    counts = [int(count) for count in actors.split(",")]
    load, names = os.getloadavg(), [each.name for each in fields(Costs)]
    costs: dict[int, list[Costs]] = {count: [] for count in counts}
    for count in counts * rounds:
        words = ["-m", "benchmarks.scheduler_costs", "--one", count, "--at-once", at_once, "--asleep", asleep]
        printed = run_python(f"{count} actors", [str(word) for word in words])
        costs[count].append(Costs(**json.loads(printed.splitlines()[-1])))
        click.echo(f"{count} actors: {printed.splitlines()[-1]}", err=True)
    print("\n".join(machine(load)))
    print(f"\n| actors | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for count in counts:
        print(f"| {count} | {' | '.join(spread([getattr(each, name) for each in costs[count]]) for name in names)} |")
    for name in names if len(counts) > 1 else []:
        start, slope = line(counts, [median(getattr(each, name) for each in costs[count]) for count in counts])
        print(f"{name}: {start:.2f} ms + {slope:.4f} ms an actor")


if __name__ == "__main__":
    main()

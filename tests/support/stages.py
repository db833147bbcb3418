"""Stages whose parts count the process that did each shard, and stages on nodes that are lost."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lib.data.shards import FileRange, Shard
from lib.engine.actor_pool import shared_pool
from lib.engine.dispatch import run_shards
from lib.engine.mapper import FusedMapper, Result, Stage
from lib.engine.workers import WorkerPlan
from lib.storage.folder import Folder


class Odd(BaseException):
    """An exception that the engine does not catch."""


@dataclass(frozen=True)
class Traced(FusedMapper):
    """A mapper that counts its process as `pid`.

    place: a folder where processes meet. seconds: of each shard, slow: of shard 0 alone. meet: so many processes must have
    come before one goes on; last: a shard that waits for all others. poison: shards that kill their process, odd: that raise
    Odd. unable: the number of processes that cannot load, from the first on.
    """

    place: str
    seconds: float = 0.0
    slow: float = 0.0
    meet: int = 0
    last: int = -1
    poison: tuple[int, ...] = ()
    odd: tuple[int, ...] = ()
    unable: int = 0

    def load(self):
        self._mark("loaded", os.getpid())
        if self._count("loaded") <= self.unable:
            raise ValueError("the weights are damaged")
        return self._work

    def _work(self, shard):
        if shard.number in self.poison:
            os._exit(9)
        if shard.number in self.odd:
            raise Odd("seventeen")
        self._mark("met", os.getpid())
        self._until(lambda: self._count("met") >= self.meet)
        if shard.number == self.last:
            self._until(lambda: self._count("done") >= shard.ranges[0].size - 1)
        time.sleep(self.seconds + (self.slow if shard.number == 0 else 0))
        self._mark("done", shard.number)
        return Result(pa.table({"shard": [shard.number]}), {"pid": os.getpid()})

    def _mark(self, event, number):
        Path(self.place, f"{event}-{number}").touch()

    def _count(self, event):
        return len(list(Path(self.place).glob(f"{event}-*")))

    def _until(self, true):
        deadline = time.monotonic() + 60
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError("waited for a minute")
            time.sleep(0.02)


def workers(count, cpus, **more):
    sizes = {"cores": 1.0, "gpus": 0.0, "task_cpus": 0.001} | more
    return WorkerPlan(minimum=1, initial=count, maximum=count, cpus=cpus, **sizes)


def started(root, count, workers, **trace):
    """The receipts of so many shards, as they come; each stage meets in a folder of its own."""
    place = Path(root, f"stage-{len(list(Path(root).glob('stage-*')))}")
    place.mkdir()
    folder = Folder(str(root))
    folder.publish("_run.json", b"{}")
    shards = [Shard(i, (FileRange("none", "none", i, i + 1, 1, count, "", None),)) for i in range(count)]
    names = {number: f"part-{number}" for number in range(count)}
    return run_shards(Stage(Traced(str(place), **trace), folder, names), shards, workers, 2)


def finished(root, count, workers, **trace):
    return list(started(root, count, workers, **trace))


def pids(receipts):
    return {receipt.counts["pid"] for receipt in receipts}


def run_apart(story, root):
    """The result of a function below, in a process of its own, where a lost node is known in a third of the time."""
    tree = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": str(tree),
        "RAY_health_check_period_ms": "1000",
    }
    line = [sys.executable, "-m", "tests.support.stages", story, root]
    ran = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@contextmanager
def nodes(*cpus):
    """A Ray cluster with a node for each number of CPUs, and those nodes; its head has none."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    added = [cluster.add_node(num_cpus=each) for each in cpus]
    ray.init(cluster.address, log_to_driver=False)
    yield cluster, added
    ray.shutdown()
    cluster.shutdown()


def two_nodes(root):
    """Lose one of two nodes when a shard has come from each: the shards done, and the number of workers that did them."""
    with nodes(1, 1) as (cluster, (lost, _)):
        receipts = []
        for receipt in started(root, 30, workers(2, 1.0), seconds=0.2, meet=2):
            receipts.append(receipt)
            if lost and len(pids(receipts)) == 2:
                cluster.remove_node(lost, allow_graceful=False)
                lost = None
    return {"done": [receipt.shard for receipt in receipts if not receipt.failure], "pids": len(pids(receipts))}


def idle_beside(root):
    """Lose the only node when one of its four workers is still busy: the shards done."""
    with nodes(4) as (cluster, (lost,)):
        receipts = []
        for receipt in started(root, 4, workers(4, 1.0), slow=4.0, meet=4):
            receipts.append(receipt)
            if len(receipts) == 3:
                cluster.add_node(num_cpus=4)
                cluster.remove_node(lost, allow_graceful=False)
    return {"done": [receipt.shard for receipt in receipts if not receipt.failure]}


def one_after_many(root):
    """Run a stage of a single shard after one of many, on two nodes: the CPUs that are free in the end."""
    import ray

    with nodes(4, 4), shared_pool():
        finished(root, 16, workers(8, 1.0), meet=8)
        finished(root, 1, workers(8, 1.0))
        time.sleep(2)  # until Ray knows
        free = ray.available_resources().get("CPU", 0)
    return {"free": free}


if __name__ == "__main__":
    story, root = sys.argv[1:]
    print(json.dumps({each.__name__: each for each in (two_nodes, idle_beside, one_after_many)}[story](root)))

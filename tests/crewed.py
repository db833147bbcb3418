"""A verb that tells which process did each shard, and runs of it on nodes that are lost."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lib.crew import together
from lib.plan import Shard, Slice
from lib.shift import perform
from lib.stages import Direct
from lib.storage import Folder
from lib.workers import Workers


class Odd(BaseException):
    """What no step catches."""


@dataclass(frozen=True)
class Told(Direct):
    """place: where processes meet. seconds: of each shard, slow: of shard 0 alone. meet: so many processes must be there before one
    goes on; last: a shard that waits for all others. poison: shards that kill their process, odd: that raise what no step catches.
    unable: processes that cannot load, from the first on."""

    place: str
    seconds: float = 0.0
    slow: float = 0.0
    meet: int = 0
    last: int = -1
    poison: tuple[int, ...] = ()
    odd: tuple[int, ...] = ()
    unable: int = 0

    def prepare(self, shard):
        if shard.number in self.poison:
            os._exit(9)
        if shard.number in self.odd:
            raise Odd("seventeen")
        self._there("met", os.getpid())
        self._until(lambda: self._count("met") >= self.meet)
        if shard.number == self.last:
            self._until(lambda: self._count("done") >= shard.slices[0].size - 1)
        time.sleep(self.seconds + (self.slow if shard.number == 0 else 0))
        return {}, {}

    def worker(self):
        self._there("loaded", os.getpid())
        if self._count("loaded") <= self.unable:
            raise ValueError("the weights are damaged")
        return lambda bundle: bundle

    def finish(self, shard, bundle):
        self._there("done", shard.number)
        return pa.table({"shard": [shard.number]}), {"rows": 1, "source_rows": 1, "pid": os.getpid()}

    def _there(self, what, number):
        Path(self.place, f"{what}-{number}").touch()

    def _count(self, what):
        return len(list(Path(self.place).glob(f"{what}-*")))

    def _until(self, true):
        deadline = time.monotonic() + 60
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError("waited for a minute")
            time.sleep(0.02)


def workers(count, cpus, **more):
    given = {"threads": 1, "gpus": 0.0, "task_cpus": 0.001} | more
    return Workers(minimum=1, initial=count, maximum=count, cpus=cpus, **given)


def begun(root, count, workers, **told):
    """The receipts of so many shards, as they come; each stage meets in a folder of its own."""
    place = Path(root, f"stage-{len(list(Path(root).glob('stage-*')))}")
    place.mkdir()
    folder = Folder(str(root))
    folder.publish("_run.json", b"{}")
    shards = [Shard(i, (Slice("none", "none", i, i + 1, 1, count, "", None),)) for i in range(count)]
    given = (Told(str(place), **told), folder, {number: f"part-{number}" for number in range(count)})
    return perform(given, shards, workers, 2)


def done(root, count, workers, **told):
    return list(begun(root, count, workers, **told))


def pids(receipts):
    return {receipt.counts["pid"] for receipt in receipts}


def main(root):
    """What comes, as JSON, of three stages: one of whose two nodes is lost at work; one whose only node is lost, when of its four
    workers one still works; and one of a single shard after one of many."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    lost, kept = (cluster.add_node(num_cpus=1) for _ in range(2))
    ray.init(cluster.address, log_to_driver=False)
    receipts = []
    for receipt in begun(root, 30, workers(2, 1.0), seconds=0.2, meet=2):
        if not receipts:
            cluster.remove_node(lost, allow_graceful=False)
        receipts.append(receipt)
    told = {"two nodes": [receipt.shard for receipt in receipts if not receipt.failure], "pids": len(pids(receipts))}

    cluster.remove_node(kept)
    lost, receipts = cluster.add_node(num_cpus=4), []
    for receipt in begun(root, 4, workers(4, 1.0), slow=4.0, meet=4):
        receipts.append(receipt)
        if len(receipts) == 3:
            cluster.add_node(num_cpus=4)
            cluster.remove_node(lost, allow_graceful=False)
    told["one node"] = [receipt.shard for receipt in receipts if not receipt.failure]

    cluster.add_node(num_cpus=4)
    with together():
        done(root, 16, workers(8, 1.0), meet=8)
        done(root, 1, workers(8, 1.0))
        time.sleep(2)  # until Ray tells of it
        told["free"] = ray.available_resources().get("CPU", 0)
    print(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])

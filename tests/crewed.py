"""A verb that tells which process did each shard, and a run of it while one of two nodes is lost."""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from lib.crew import perform, together
from lib.plan import Shard, Slice
from lib.stages import Direct
from lib.storage import Folder
from lib.workers import Workers


@dataclass(frozen=True)
class Told(Direct):
    """seconds: of a shard; poison: shards that kill their process; loads: whether a worker can start."""

    seconds: float = 0.0
    poison: tuple[int, ...] = ()
    loads: bool = True

    def prepare(self, shard):
        if shard.number in self.poison:
            os._exit(9)
        time.sleep(self.seconds)
        return {}, {}

    def worker(self):
        if not self.loads:
            raise ValueError("the weights are damaged")
        return lambda bundle: bundle

    def finish(self, shard, bundle):
        return pa.table({"shard": [shard.number]}), {"rows": 1, "source_rows": 1, "pid": os.getpid()}


def shards(count):
    return [Shard(i, (Slice("none", "none", i, i + 1, 1, 1, "", None),)) for i in range(count)]


def workers(count, cpus, **more):
    given = {"threads": 1, "gpus": 0.0, "task_cpus": 0.001} | more
    return Workers(minimum=1, initial=count, maximum=count, cpus=cpus, **given)


def done(place, verb, count, workers):
    """The receipts of so many shards."""
    folder = Folder(str(place))
    folder.publish("_run.json", b"{}")
    given = (verb, folder, {number: f"part-{number}" for number in range(count)})
    return list(perform(given, shards(count), workers, 2))


def pids(receipts):
    return {receipt.counts["pid"] for receipt in receipts}


def main(place):
    """Two nodes of a worker each. One is lost at work; with another in its place, a stage of many shards and one of a single one
    follow each other. What came of it, as JSON."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    lost, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
    ray.init(cluster.address, log_to_driver=False)
    threading.Timer(6.0, cluster.remove_node, [lost], {"allow_graceful": False}).start()
    began = time.monotonic()
    receipts = done(place, Told(seconds=0.5), 40, workers(2, 1.0))
    told = {"seconds": time.monotonic() - began, "pids": len(pids(receipts))}
    told["shards"] = sorted(receipt.shard for receipt in receipts if not receipt.failure)
    cluster.add_node(num_cpus=1)
    with together():
        done(place, Told(), 8, workers(2, 1.0))
        done(place, Told(), 1, workers(2, 1.0))
        time.sleep(2)  # until Ray tells of it
        free = ray.available_resources().get("CPU", 0)
    print(json.dumps(told | {"free": free}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])

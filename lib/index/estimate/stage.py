"""A stage of a build that does not exist yet, in numbers."""

import math
from dataclasses import dataclass

from ...engine.workers import WorkerPlan

DRIVER_SECONDS = 0.0015  # a shard: 1.0 and 1.1 ms were measured with 2 and 24 workers
RUN_OBJECTS = 3  # of each stage: its settings, its plan, its manifest


@dataclass(frozen=True)
class StageEstimate:
    """slices: rows of the plan. read, written: bytes. memory: of a worker, bytes. seconds: of cores, over all shards.

    workers: the cluster's, or why there are none. other_objects: beside parts and run. serial_seconds: of one core, while the
    others wait. whole_node: its one worker takes all cores of a node.
    """

    name: str
    shards: int
    slices: int
    read: float
    written: float
    memory: float
    seconds: float
    workers: WorkerPlan | str
    other_objects: int = 0
    serial_seconds: float = 0.0
    whole_node: bool = False

    @property
    def objects(self) -> int:
        return self.shards + RUN_OBJECTS + self.other_objects

    @property
    def core_seconds(self) -> float:
        return self.seconds + self.serial_seconds

    def clock(self, workers: int, threads: int) -> float:
        """Seconds from the first shard to the last, with so many workers of so many cores."""
        rounds = math.ceil(self.shards / workers)
        return max(rounds * self.seconds / self.shards / threads, DRIVER_SECONDS * self.shards) + self.serial_seconds

    @property
    def current_clock(self) -> float | None:
        """The same with the cluster's workers."""
        return None if isinstance(self.workers, str) else self.clock(self.workers.maximum, self.workers.threads)

"""The executor in this process: shards one after the other, without Ray. For small runs, notebooks and tests."""

from collections.abc import Iterator, Sequence

from ..data.shards import Shard
from ..errors import RunError
from .mapper import Receipt, ShardRunner, Stage
from .workers import WorkerPlan


def run_shards(stage: Stage, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Iterator[Receipt]:
    """A receipt of each shard, in order. Raises RunError when the mapper cannot be loaded."""
    try:
        runner = ShardRunner(stage)
    except RuntimeError as error:
        raise RunError(f"the model could not be loaded: {error}") from error
    for shard in shards:
        yield runner.run(shard)

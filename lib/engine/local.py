"""The executor in this process: shards one after the other, without Ray. For small runs, notebooks and tests."""

from collections.abc import Iterator, Mapping, Sequence

from ..data.shards import Shard
from ..errors import RunError
from ..storage.folder import Folder
from .mapper import AnyMapper, Loaded, Mapper, Receipt, ShardRunner, Tables
from .workers import WorkerPlan


def run_shards(
    mapper: AnyMapper,
    folder: Folder,
    part_names: Mapping[int, str],
    shards: Sequence[Shard],
    workers: WorkerPlan,
    in_flight: int,
) -> Iterator[Receipt]:
    """A receipt of each shard, in order. Raises RunError when the mapper cannot be loaded."""
    try:
        runner = ShardRunner(mapper, folder, part_names)
    except RuntimeError as error:
        raise RunError(f"the model could not be loaded: {error}") from error
    for shard in shards:
        yield runner.run(shard)


def sample(mapper: Mapper, shards: Sequence[Shard], workers: WorkerPlan) -> Iterator[tuple[Receipt, Tables]]:
    """The tables that the loaded model makes of a few shards; nothing is published."""
    loaded = Loaded(mapper.load)
    for shard in shards:
        receipt, tables = Receipt(shard.number), Tables()
        if loaded.ready(receipt):
            with receipt.catching():
                tables = loaded.work(mapper.read(shard)[0])
        yield receipt, tables

"""The executor on Ray Data, for mappers whose reading overlaps the model. Nothing else imports ray.data.

    pending shards -> read (CPU) -> model (actor pool) -> publish (CPU) -> receipts

One shard is one row of one block at every step, so nothing can split, merge or mix shards, and a replayed task makes the same
number of blocks. Between two steps the row holds the shard and its receipt as JSON, and its tables as Arrow buffers. A failure
is written into the receipt and travels on; it is never raised. Receipts go to the driver; rows never do.
"""

import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from ..data.shards import FileRange, Shard
from ..errors import RunError
from .actor_pool import release_shared_pool
from .dispatch import DIED, MAX_ACTOR_DEATHS
from .mapper import Loaded, Mapper, Receipt, Stage, Tables
from .workers import WorkerPlan, with_current_nodes

ONE_SHARD = {"batch_size": 1, "batch_format": "pyarrow"}


def run_shards(stage: Stage, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Iterator[Receipt]:
    """A receipt of each shard, in no order, but of those that Ray Data gave up on. in_flight: shards that a worker has at once."""
    workers = with_current_nodes(workers).at_most(len(shards))
    computed = _through_workers(stage.mapper, shards, workers, in_flight)
    for batch in _iterate(_cpu_step(computed, Publish, stage, workers, in_flight)):
        for text in batch["receipt"].to_pylist():
            yield Receipt(**json.loads(text))


def sample(mapper: Mapper, shards: Sequence[Shard], workers: WorkerPlan) -> Iterator[tuple[Receipt, Tables]]:
    """The tables that workers make of a few shards, brought to the driver and published nowhere."""
    for batch in _iterate(_through_workers(mapper, shards, workers.at_most(len(shards)), in_flight=2)):
        _, receipt, tables = _unpack(batch)
        yield receipt, tables


def _pack(shard: Shard, receipt: Receipt, tables: Tables) -> pa.Table:
    """A shard as one row: its receipt and ranges as JSON, each table as one Arrow IPC buffer, not copied again."""
    columns: dict[str, pa.Array] = {
        "shard": pa.array([json.dumps([shard.number, [asdict(each) for each in shard.ranges]])]),
        "receipt": pa.array([json.dumps(asdict(receipt))]),
    }
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        buffer = sink.getvalue()
        ends = pa.array([0, buffer.size], pa.int64()).buffers()[1]
        columns[name] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])
    return pa.table(columns)


def _unpack(row: pa.Table) -> tuple[Shard, Receipt, Tables]:
    """The shard, its receipt, and its tables as views of the row's buffers."""
    number, ranges = json.loads(row["shard"][0].as_py())
    shard = Shard(number, tuple(FileRange(**each) for each in ranges))
    names = [field.name for field in row.schema if pa.types.is_large_binary(field.type)]
    tables = {name: pa.ipc.open_stream(row[name][0].as_buffer()).read_all() for name in names}
    return shard, Receipt(**json.loads(row["receipt"][0].as_py())), tables


class Read:
    """Pending shard -> read tables."""

    def __init__(self, mapper: Mapper):
        self.mapper = mapper

    def __call__(self, row: pa.Table) -> pa.Table:
        shard, receipt, tables = _unpack(row)
        with receipt.catching():
            tables, receipt.seconds = self.mapper.read(shard)
        return _pack(shard, receipt, tables)


class Compute:
    """Read tables -> computed tables, in an actor that holds the model."""

    def __init__(self, mapper: Mapper):
        self.loaded = Loaded(mapper.load)

    def __call__(self, row: pa.Table) -> pa.Table:
        shard, receipt, tables = _unpack(row)
        receipt.worked_from = time.time()
        if self.loaded.ready(receipt):
            with receipt.catching(), receipt.timing("encode"):
                tables = self.loaded.work(tables)
        return _pack(shard, receipt, {} if receipt.failure else tables)


class Publish:
    """Computed tables -> published part -> receipt."""

    def __init__(self, stage: Stage):
        self.stage = stage

    def __call__(self, row: pa.Table) -> pa.Table:
        shard, receipt, tables = _unpack(row)
        if receipt.failure is None:
            with receipt.catching(), receipt.timing("write"):
                self.stage.publish(shard, self.stage.mapper.to_result(shard, tables), receipt)
        return pa.table({"receipt": [json.dumps(asdict(receipt))]})


def _through_workers(mapper: Mapper, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Any:
    """The lazy dataset up to and with the workers: one row a shard."""
    import ray.data

    release_shared_pool()
    _configure(workers)
    rows = [_pack(shard, Receipt(shard.number), {}) for shard in shards]
    pending = ray.data.from_blocks(rows)  # from_arrow would run a task of a whole CPU for each of them
    read = _cpu_step(pending, Read, mapper, workers, in_flight)
    sizes, gpus = (workers.minimum, workers.initial, workers.maximum), workers.gpus or None
    return _actor_step(read, Compute, mapper, sizes, in_flight, num_cpus=workers.cpus, num_gpus=gpus)


def _cpu_step(dataset: Any, step: type, work: Mapper | Stage, workers: WorkerPlan, in_flight: int) -> Any:
    """A reading or writing step added to a dataset. Its process may die MAX_ACTOR_DEATHS times a round, then the shard waits.

    Tasks where CPUs are free. On nodes full of CPU workers Ray ends an idle process after a second, and a task after a pause would
    start Python again (2.5 s of a core): there the steps are actors too, one for two workers, each with 1 % of a worker's time.
    """
    if workers.gpus:
        task = step(work).__call__
        return dataset.map_batches(task, num_cpus=workers.task_cpus, max_retries=MAX_ACTOR_DEATHS, **ONE_SHARD)
    initial, maximum = -(-workers.initial // 2), -(-workers.maximum // 2)
    return _actor_step(dataset, step, work, (initial, initial, maximum), in_flight, num_cpus=workers.task_cpus)


def _actor_step(
    dataset: Any,
    step: type,
    work: Mapper | Stage,
    sizes: tuple[int, int, int],
    in_flight: int,
    **resources: float | None,
) -> Any:
    """A step in actors, added to a dataset. sizes: the least, the first and the most actors."""
    from ray.data import ActorPoolStrategy

    limits: Any = dict(zip(("min_size", "initial_size", "max_size"), sizes, strict=True))
    pool = ActorPoolStrategy(**limits, max_tasks_in_flight_per_actor=in_flight)
    options: dict[str, Any] = {"compute": pool, "max_task_retries": MAX_ACTOR_DEATHS, **resources, **ONE_SHARD}
    return dataset.map_batches(step, fn_constructor_args=(work,), **options)


def _configure(workers: WorkerPlan) -> None:
    """Set Ray Data's options, each for a measured reason."""
    from ray.data import DataContext

    logger = logging.getLogger("ray.data")
    logger.handlers, logger.propagate = [LAST_ERROR], False
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")  # the only way to max_task_retries until 2.64
    context = DataContext.get_current()
    context.target_max_block_size = None  # a shard must stay one block
    # Of every step: Ray Data's requests to an autoscaler bear these labels too, else it would start nodes of any kind.
    context.execution_options.label_selector = dict(workers.labels) or None
    context.max_errored_blocks = -1  # a poison shard must not end the run; the audit sees what is missing
    context.execution_options.preserve_order = False
    context.actor_init_retry_on_errors = True  # a GPU that is not ready yet
    context.execution_no_progress_timeout_s = -1  # half an hour without spot GPUs is a wait, not an end
    context.print_on_execution_start = False
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False


def _iterate(dataset: Any) -> Iterable[pa.Table]:
    """Blocks as they finish. Raises RunError with the cause when Ray Data itself gives up."""
    import ray.exceptions

    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except (ray.exceptions.RayError, RuntimeError) as error:
        cause = _cause(error)
        raise RunError(f"the workers could not run: {type(cause).__name__}: {str(cause)[-2000:]}") from error


def _cause(error: BaseException) -> BaseException:
    """The deepest cause with a message; Ray Data ends the chain with an empty exception of its own."""
    deepest = error
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
        deepest = error if str(error) else deepest
    return deepest


class LastError(logging.Handler):
    """Keeps the last error that Ray Data logged of a block that it gives up on; nothing is printed."""

    line = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.getMessage()}\n{record.exc_info[1] if record.exc_info else ''}"
        lines = [line.strip() for line in text.splitlines() if "Error" in line or "died" in line]
        self.line = lines[-1][:300] if lines else self.line

    def explain(self, reason: str) -> str:
        """The reason, with Ray's last error where the reason is that processes died."""
        return f"{reason} (Ray's last error: {self.line})" if reason == DIED and self.line else reason


LAST_ERROR = LastError(logging.ERROR)

"""The three steps of a shard in the processes of the cluster: prepare, work, publish.

Between two steps a shard is one row of one block: its slices and its receipt as JSON, its tables as Arrow buffers. A
failure is written into the receipt and travels on; it is never raised.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from ..data.shards import FileRange, Shard
from ..errors import ShoalError
from ..storage.folder import Folder
from .parts import publish_part

NOT_FINITE = "that is not finite"  # in the reason of a row whose model gave NaN or an infinity
Tables = dict[str, pa.Table]  # what a shard is between two steps; every table travels as one buffer


class Mapper(Protocol):
    """What one job does with a shard. Picklable: it travels to every task and actor."""

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Read and prepare, on CPUs. Also the seconds spent, by stage."""
        ...

    def worker(self) -> Callable[[Tables], Tables]:
        """Called once in every process; what it returns is called once a shard."""
        ...

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        """The rows to publish, and counts: `rows`, `source_rows`, `errors`, `truncated`, `tokens`, ..."""
        ...


class FusedMapper:
    """Base of verbs that have nothing to overlap: the worker does the reading, and the engine does all three steps in it."""


@dataclass
class Receipt:
    """What the driver hears of one shard."""

    shard: int
    failure: str | None = None
    error: str | None = None  # the class of a ShoalError, which stops the run
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    part: dict[str, Any] | None = None
    worked_from: float | None = None  # epoch seconds at which a loaded worker took it


def pack(receipt: Receipt, shard: Shard, bundle: Tables) -> pa.Table:
    """A shard as one row: its receipt and slices as JSON, each table as one Arrow IPC buffer, not copied again."""
    columns: dict[str, pa.Array] = {
        "shard": pa.array([json.dumps([shard.number, [asdict(piece) for piece in shard.slices]])]),
        "receipt": pa.array([json.dumps(asdict(receipt))]),
    }
    for name, table in bundle.items():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        buffer = sink.getvalue()
        ends = pa.array([0, buffer.size], pa.int64()).buffers()[1]
        columns[name] = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])
    return pa.table(columns)


def unpack(row: pa.Table) -> tuple[Receipt, Tables]:
    """The receipt, and the tables as views of the row's buffers."""
    bundle: Tables = {}
    for name in row.column_names:
        if pa.types.is_large_binary(row.schema.field(name).type):
            bundle[name] = pa.ipc.open_stream(row[name][0].as_buffer()).read_all()
    return Receipt(**json.loads(row["receipt"][0].as_py())), bundle


def _shard_of(row: pa.Table) -> Shard:
    number, slices = json.loads(row["shard"][0].as_py())
    return Shard(number, tuple(FileRange(**piece) for piece in slices))


class Prepare:
    """Pending shard -> prepared bundle."""

    def __init__(self, verb: Mapper):
        self.verb = verb

    def __call__(self, row: pa.Table) -> pa.Table:
        shard = _shard_of(row)
        receipt = Receipt(shard.number)
        return pack(receipt, shard, self.step(shard, receipt, {}))

    def step(self, shard: Shard, receipt: Receipt, bundle: Tables) -> Tables:
        with _caught(receipt):
            bundle, seconds = self.verb.prepare(shard)
            receipt.seconds |= seconds
        return bundle


class Work:
    """Prepared bundle -> worked bundle, in an actor that holds the model."""

    def __init__(self, verb: Mapper):
        self.broken = Receipt(-1)  # an exception here would reach the driver after four more tries, without its words
        with _caught(self.broken):
            self.work = verb.worker()
        if self.broken.failure and not self.broken.error:
            raise RuntimeError(self.broken.failure)  # a GPU that is not ready yet: Ray starts another actor

    def __call__(self, row: pa.Table) -> pa.Table:
        receipt, bundle = unpack(row)
        shard = _shard_of(row)
        bundle = self.step(shard, receipt, bundle)
        return pack(receipt, shard, {} if receipt.failure else bundle)

    def step(self, shard: Shard, receipt: Receipt, bundle: Tables) -> Tables:
        began = time.perf_counter()
        receipt.worked_from = time.time()
        if self.broken.error:
            receipt.error, receipt.failure = self.broken.error, self.broken.failure
        if receipt.failure is None:
            with _caught(receipt):
                bundle = self.work(bundle)
                receipt.seconds["encode"] = time.perf_counter() - began
        return bundle


class Publish:
    """Worked bundle -> published part -> receipt."""

    def __init__(self, verb: Mapper, folder: Folder, names: Mapping[int, str]):
        self.verb, self.folder, self.names = verb, folder, names

    def __call__(self, row: pa.Table) -> pa.Table:
        receipt, bundle = unpack(row)
        self.step(_shard_of(row), receipt, bundle)
        return pa.table({"receipt": [json.dumps(asdict(receipt))]})

    def step(self, shard: Shard, receipt: Receipt, bundle: Tables) -> Tables:
        began = time.perf_counter()
        if receipt.failure is None:
            with _caught(receipt):
                self._publish(shard, bundle, receipt)
                receipt.seconds["write"] = time.perf_counter() - began
        return {}

    def _publish(self, shard: Shard, bundle: Tables, receipt: Receipt) -> None:
        table, counts = self.verb.finish(shard, bundle)
        if shard.rows not in (-1, counts["source_rows"]):
            raise RuntimeError(f"read {counts['source_rows']} rows where the plan has {shard.rows}")
        receipt.counts = counts
        receipt.part = asdict(publish_part(self.folder, self.names[shard.number], shard.number, table, counts))


class Whole:
    """Pending shard -> receipt, in one process."""

    def __init__(self, verb: Mapper, folder: Folder, names: Mapping[int, str]):
        self.steps = Prepare(verb), Work(verb), Publish(verb, folder, names)

    def do(self, shard: Shard) -> Receipt:
        receipt, bundle = Receipt(shard.number), Tables()
        for each in self.steps:
            bundle = each.step(shard, receipt, bundle)
        return receipt


@contextmanager
def _caught(receipt: Receipt) -> Iterator[None]:
    """Write a failure into the receipt instead of raising: a raise would make Ray drop or repeat the shard."""
    try:
        yield
    except ShoalError as error:
        receipt.error, receipt.failure = type(error).__name__, str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        receipt.failure = f"{type(error).__name__}: {error} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"

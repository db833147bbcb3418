"""Mappers: the work that a job does on one shard, and the receipt that comes back of it.

A Mapper has three steps, which Ray Data overlaps in different processes: `read` on CPUs, the loaded model, `to_result`. It is
for jobs whose reading and tokenising keep CPUs busy beside the model. A FusedMapper does all of a shard in one call of its
worker. Both run on every executor they can: see executor.py.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from ..data.shards import Shard
from ..errors import ShoalError
from ..storage.folder import Folder
from .parts import publish_part

W = TypeVar("W")
Tables = dict[str, pa.Table]  # a shard between two steps of a Mapper; every table travels as one buffer


@dataclass(frozen=True)
class Result:
    """The outcome of one shard.

    table: the rows to publish. counts: over `rows` (default: those of the table) and `source_rows` (default: the rows that the
    plan expects), `errors`, `truncated`, `tokens`, ... facts: JSON values for the driver, kept in the part's footer: see
    parts.read_facts. groups: rows of each row group of the part; 0 for none. seconds: spent, by stage.
    """

    table: pa.Table
    counts: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[int] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Mapper(Protocol):
    """Work whose reading overlaps the model. Picklable: it travels to every task and actor."""

    def read(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Read and prepare, on CPUs. Also returns the seconds spent, by stage."""
        ...

    def load(self) -> Callable[[Tables], Tables]:
        """Load the model, once in every worker; the returned function is called once a shard."""
        ...

    def to_result(self, shard: Shard, tables: Tables) -> Result:
        """The rows to publish, on CPUs."""
        ...


class FusedMapper:
    """Base of mappers whose worker reads its shard itself. Picklable."""

    def load(self) -> Callable[[Shard], Result]:
        """Load what every shard needs, once in every worker; the returned function is called once a shard."""
        raise NotImplementedError


AnyMapper = Mapper | FusedMapper


@dataclass
class Receipt:
    """The driver's copy of what happened to one shard."""

    shard: int
    failure: str | None = None
    error: str | None = None  # class name of a ShoalError, which stops the run
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    part: dict[str, Any] | None = None
    worked_from: float | None = None  # epoch seconds at which a loaded worker took it

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Write a failure into the receipt instead of raising: a raise would make Ray drop or repeat the shard."""
        try:
            yield
        except ShoalError as error:
            self.error, self.failure = type(error).__name__, str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.failure = f"{type(error).__name__}: {error} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to those of the stage, when it ends well."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def publish(folder: Folder, name: str, shard: Shard, result: Result, receipt: Receipt) -> None:
    """Publish a shard's part and note it in the receipt. Raises RuntimeError when rows of the plan were not read."""
    counts = {"rows": result.table.num_rows, "source_rows": shard.rows} | dict(result.counts)
    if shard.rows not in (-1, counts["source_rows"]):
        raise RuntimeError(f"read {counts['source_rows']} rows where the plan has {shard.rows}")
    receipt.counts = counts
    receipt.part = asdict(publish_part(folder, name, shard.number, result.table, counts, result.facts, result.groups))


def fused(mapper: AnyMapper) -> Callable[[Shard, Receipt], Result]:
    """Load the mapper; the returned function does all its steps in this process, and notes their seconds."""
    if isinstance(mapper, FusedMapper):
        work = mapper.load()

        def call(shard: Shard, receipt: Receipt) -> Result:
            began = time.perf_counter()
            result = work(shard)
            spent = time.perf_counter() - began - sum(result.seconds.values())
            receipt.seconds |= {"encode": spent, **result.seconds}
            return result

        return call
    model, steps = mapper.load(), mapper

    def call_steps(shard: Shard, receipt: Receipt) -> Result:
        tables, seconds = steps.read(shard)
        receipt.seconds |= seconds
        with receipt.timing("encode"):
            tables = model(tables)
        return steps.to_result(shard, tables)

    return call_steps


class Loaded(Generic[W]):
    """The result of loading, or the ShoalError that it raised, which every shard's receipt then carries to the driver.

    Any other exception is raised as a RuntimeError: a GPU may not be ready yet, and Ray starts another worker.
    """

    def __init__(self, load: Callable[[], W]):
        self.refusal = Receipt(-1)
        with self.refusal.catching():
            self.work = load()
        if self.refusal.failure and not self.refusal.error:
            raise RuntimeError(self.refusal.failure)

    def ready(self, receipt: Receipt) -> bool:
        """Whether shards can be done; if not, the receipt says why."""
        if self.refusal.error:
            receipt.error, receipt.failure = self.refusal.error, self.refusal.failure
        return receipt.failure is None


class ShardRunner:
    """Whole shards in one process: loads once, then turns shards into receipts."""

    def __init__(self, mapper: AnyMapper, folder: Folder, part_names: Mapping[int, str]):
        self.folder, self.part_names = folder, part_names
        self.loaded = Loaded(lambda: fused(mapper))

    def run(self, shard: Shard) -> Receipt:
        """Read, compute and publish one shard. A failure is in the receipt."""
        receipt = Receipt(shard.number, worked_from=time.time())
        if not self.loaded.ready(receipt):
            return receipt
        with receipt.catching():
            result = self.loaded.work(shard, receipt)
            with receipt.timing("write"):
                publish(self.folder, self.part_names[shard.number], shard, result, receipt)
        return receipt

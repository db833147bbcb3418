"""Mappers: the work that a job does on one shard, and the receipt that comes back of it.

A Mapper has three steps, which Ray Data overlaps in different processes: `read` on CPUs, the loaded model, `to_result`. It is
for jobs whose reading and tokenising keep CPUs busy beside the model. A FusedMapper does a shard in one call of its worker.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from ..data.shards import Shard
from ..errors import ShoalError
from ..storage.folder import Folder
from .publish import publish_part

Tables = dict[str, pa.Table]  # a shard between two steps of a Mapper; every table travels as one buffer


@dataclass(frozen=True)
class Result:
    """The outcome of one shard. table: the rows to publish. seconds: spent, by step. groups: rows of each row group of the part.

    counts: `rows` (default: those of the table), `source_rows` (default: those that the plan expects), `errors`, `truncated`,
    `tokens`, ... facts: JSON values for the driver, kept in the part's footer: see parts.read_facts.
    """

    table: pa.Table
    counts: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[int] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Mapper(Protocol):
    """Work whose reading overlaps the model. Picklable: it travels to every task and actor."""

    def read(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        """Read and prepare, on CPUs. Also returns the seconds spent, by step."""

    def load(self) -> Callable[[Tables], Tables]:
        """Load the model, once in every worker; the returned function is called once a shard."""

    def to_result(self, shard: Shard, tables: Tables) -> Result:
        """The rows to publish, on CPUs."""


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
    def timing(self, step: str) -> Iterator[None]:
        """Note the seconds of the block, when it ends well."""
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began


@dataclass(frozen=True)
class Stage:
    """The work on shards: their mapper, and the folder and names of their parts."""

    mapper: Any  # AnyMapper
    folder: Folder
    part_names: Mapping[int, str]

    def publish(self, shard: Shard, result: Result, receipt: Receipt) -> None:
        """Publish a shard's part and note it in the receipt. Raises RuntimeError when rows of the plan were not read."""
        counts = {"rows": result.table.num_rows, "source_rows": shard.rows} | dict(result.counts)
        if shard.rows not in (-1, counts["source_rows"]):
            raise RuntimeError(f"read {counts['source_rows']} rows where the plan has {shard.rows}")
        name = self.part_names[shard.number]
        part = publish_part(self.folder, name, shard.number, result.table, counts, result.facts, result.groups)
        receipt.counts, receipt.part = counts, asdict(part)


def _load(mapper: AnyMapper) -> Callable[[Shard], Result]:
    """Load the mapper; the returned function does all its steps in this process."""
    if isinstance(mapper, FusedMapper):
        return mapper.load()
    model = mapper.load()

    def work(shard: Shard) -> Result:
        tables, seconds = mapper.read(shard)
        result = mapper.to_result(shard, model(tables))
        return replace(result, seconds={**seconds, **result.seconds})

    return work


class Loaded:
    """A loaded function, or the ShoalError that it raised, which every shard's receipt then carries to the driver.

    Any other exception becomes a RuntimeError: a GPU may not be ready yet, and Ray starts another worker.
    """

    def __init__(self, load: Callable[[], Callable[[Any], Any]]):
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

    def __init__(self, stage: Stage):
        self.stage = stage
        self.loaded = Loaded(lambda: _load(stage.mapper))

    def run(self, shard: Shard) -> Receipt:
        """Read, compute and publish one shard. A failure is in the receipt."""
        receipt = Receipt(shard.number, worked_from=time.time())
        if not self.loaded.ready(receipt):
            return receipt
        with receipt.catching():
            began = time.perf_counter()
            result = self.loaded.work(shard)
            spent = time.perf_counter() - began
            receipt.seconds |= {"encode": spent - sum(result.seconds.values()), **result.seconds}
            with receipt.timing("write"):
                self.stage.publish(shard, result, receipt)
        return receipt

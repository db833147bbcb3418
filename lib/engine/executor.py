"""The exactly-once map over shards, on Ray Data.

    pending shards -> read and prepare (CPU) -> worker (actor pool) -> finish and publish (CPU) -> receipts

One shard is one row of one block at every step, so nothing can split, merge or mix shards, and a replayed task makes the same
number of blocks. Where the worker itself reads (Direct), all three steps are its own, and the workers are a crew (shift.py), without
Ray Data. Receipts go to the driver; rows never do. What a person can mend (ShoalError) stops the run; any other failure of a shard
is tried again, `ATTEMPTS` times over, and then the shard is quarantined with its reason.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .. import errors
from ..cli.progress import Progress
from ..data.shards import Shard
from ..errors import RunError, ShoalError
from .actor_pool import release_shared_pool, shared_pool
from .dispatch import DIED, MAX_ACTOR_DEATHS, dispatch
from .lease import ALL, ShardSlice
from .mapper import FusedMapper, Mapper, Prepare, Publish, Receipt, Tables, Work, pack, unpack
from .parts import Part
from .run import Run, audit, missing, write_quarantine
from .workers import WorkerPlan, with_current_nodes

ATTEMPTS = 3  # rounds over the shards that failed
WAVE = 4000  # shards at once, at least; on each the driver spends 7 to 16 kB and 11 to 17 ms of Ray Data's, or 5 kB and 1 ms
WAVE_A_WORKER = 16  # and at least so many for each worker: all wait for a wave's last shard, and Ray Data's start anew
ONE_SHARD = {"batch_size": 1, "batch_format": "pyarrow"}
WAVE_SLICES = 100_000  # 0.9 kB each in the driver


class _LastError(logging.Handler):
    """Ray Data logs what befell a block that it gives up on; the driver keeps the last such line instead of printing."""

    said = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.getMessage()}\n{record.exc_info[1] if record.exc_info else ''}"
        lines = [line.strip() for line in text.splitlines() if "Error" in line or "died" in line]
        self.said = lines[-1][:300] if lines else self.said

    def explain(self, reason: str) -> str:
        return f"{reason} (Ray's last error: {self.said})" if reason == DIED and self.said else reason


_LOG = _LastError(logging.ERROR)


@dataclass
class Outcome:
    """How a run ended: every part (empty while shards are missing), and shards given up on with their reasons.

    elsewhere: shards still missing that are of other drivers' slices. notes: sentences for the report.
    """

    parts: list[Part]
    quarantined: dict[int, str]
    progress: Progress
    elsewhere: int = 0
    notes: tuple[str, ...] = ()


def execute(
    verb: Mapper,
    ledger: Run,
    workers: WorkerPlan,
    progress: Progress,
    pending: Sequence[int],
    share: ShardSlice = ALL,
    still_held: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do the pending shards, which are all that are missing of the share; audit when no other is missing either.

    still_held: raises when another driver has taken the share over. Raises ShoalError for what a person must mend; what is
    done stays done.
    """
    parts: dict[int, Part] = {}
    reasons: dict[int, str] = {}
    todo = list(pending)
    with progress.shown(), shared_pool():  # one crew for all waves and rounds
        for attempt in range(ATTEMPTS):
            # Alone on its worker in the last round, a shard can no longer be a bystander of another's crash.
            in_flight = 1 if attempt == ATTEMPTS - 1 else 2
            reasons = dict.fromkeys(todo, DIED)
            for wave in _waves(ledger.shards(todo), max(WAVE, WAVE_A_WORKER * workers.maximum), WAVE_SLICES):
                still_held()
                for receipt in _run_wave(verb, ledger, workers, wave, in_flight):
                    still_held()
                    _note(receipt, parts, reasons, progress)
            todo = sorted(reasons)
            if not todo:
                break
    still_held()
    gone = set(missing(ledger)) if reasons or share != ALL else set()
    quarantined = {number: _LOG.explain(reason) for number, reason in reasons.items() if number in gone}
    elsewhere = {number for number in gone if not share.has(number)}
    write_quarantine(ledger.folder, quarantined, elsewhere)
    return Outcome([] if quarantined or elsewhere else audit(ledger, parts), quarantined, progress, len(elsewhere))


def sample(verb: Mapper, shards: Sequence[Shard], workers: WorkerPlan) -> list[Tables]:
    """What the workers make of a few shards, brought to the driver and published nowhere."""
    dataset = _worked(verb, shards, workers.at_most(len(shards)), in_flight=2)
    bundles = []
    for batch in _iterate(dataset):
        receipt, bundle = unpack(batch)
        _raise_if_final(receipt)
        if receipt.failure:
            raise RunError(f"the sample failed: {receipt.failure}")
        bundles.append(bundle)
    return bundles


def _waves(shards: Iterator[Shard], most: int, most_slices: int) -> Iterator[list[Shard]]:
    """Shards in runs of at most so many, or of so many slices, of which one shard may have more."""
    wave: list[Shard] = []
    slices = 0
    for shard in shards:
        if wave and (len(wave) == most or slices + len(shard.slices) > most_slices):
            yield wave
            wave, slices = [], 0
        wave.append(shard)
        slices += len(shard.slices)
    if wave:
        yield wave


def _run_wave(
    verb: Mapper, ledger: Run, workers: WorkerPlan, wave: Sequence[Shard], in_flight: int
) -> Iterator[Receipt]:
    names = {shard.number: ledger.part_name(shard) for shard in wave}
    if isinstance(verb, FusedMapper):
        yield from dispatch((verb, ledger.folder, names), wave, workers, in_flight)
        return
    workers = with_current_nodes(workers).at_most(len(wave))
    worked = _worked(verb, wave, workers, in_flight)
    for batch in _iterate(_step(worked, Publish, (verb, ledger.folder, names), workers, in_flight)):
        for text in batch["receipt"].to_pylist():
            yield Receipt(**json.loads(text))


def _worked(verb: Mapper, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Any:
    """The lazy dataset up to and with the workers: one row a shard."""
    prepared = _step(_pending(shards, workers), Prepare, (verb,), workers, in_flight)
    return _by_workers(prepared, verb, workers, in_flight)


def _pending(shards: Sequence[Shard], workers: WorkerPlan) -> Any:
    import ray.data

    release_shared_pool()
    _settle_ray_data(workers)
    rows = [pack(Receipt(shard.number), shard, {}) for shard in shards]
    return ray.data.from_blocks(rows)  # from_arrow would run a task of a whole CPU for each of them


def _by_workers(dataset: Any, verb: Mapper, workers: WorkerPlan, in_flight: int) -> Any:
    return dataset.map_batches(
        Work,
        fn_constructor_args=(verb,),
        compute=_pool(workers.minimum, workers.initial, workers.maximum, in_flight),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        max_task_retries=MAX_ACTOR_DEATHS,
        **ONE_SHARD,
    )


def _step(dataset: Any, kind: type, arguments: tuple[Any, ...], workers: WorkerPlan, in_flight: int) -> Any:
    """A reading or writing step added to a dataset. Its process may die DEATHS times a round, then the shard waits.

    Tasks where CPUs are free. On nodes full of CPU workers Ray ends an idle process after a second, and a task after a
    pause would start Python again (2.5 s of a core): there the steps are actors too, one for two workers. Such an actor
    takes 1 % of a worker's time, but loads a tokenizer while the workers load their models.
    """
    if workers.gpus:
        step = kind(*arguments).__call__
        return dataset.map_batches(step, num_cpus=workers.task_cpus, max_retries=MAX_ACTOR_DEATHS, **ONE_SHARD)
    initial, maximum = -(-workers.initial // 2), -(-workers.maximum // 2)
    return dataset.map_batches(
        kind,
        fn_constructor_args=arguments,
        compute=_pool(initial, initial, maximum, in_flight),
        num_cpus=workers.task_cpus,
        max_task_retries=MAX_ACTOR_DEATHS,
        **ONE_SHARD,
    )


def _pool(minimum: int, initial: int, maximum: int, in_flight: int) -> Any:
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(
        min_size=minimum, initial_size=initial, max_size=maximum, max_tasks_in_flight_per_actor=in_flight
    )


def _settle_ray_data(workers: WorkerPlan) -> None:
    """Ray Data's settings, each for a measured reason."""
    from ray.data import DataContext

    logger = logging.getLogger("ray.data")
    logger.handlers, logger.propagate = [_LOG], False
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")  # the only way to max_task_retries until 2.64
    context = DataContext.get_current()
    context.target_max_block_size = None  # a shard must stay one block
    # Of every step: what Ray Data asks of an autoscaler bears these labels too, else it would start nodes of any kind.
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
    """The deepest cause with words; Ray Data ends the chain with an empty exception of its own."""
    found = error
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
        found = error if str(error) else found
    return found


def _note(receipt: Receipt, parts: dict[int, Part], reasons: dict[int, str], progress: Progress) -> None:
    _raise_if_final(receipt)
    if receipt.failure is not None or receipt.part is None:
        reasons[receipt.shard] = receipt.failure or "no part was written"
        progress.failures += 1
        return
    parts[receipt.shard] = Part(**receipt.part)
    if reasons.pop(receipt.shard, None) is not None:
        progress.add(receipt.counts, receipt.seconds, receipt.worked_from)


def _raise_if_final(receipt: Receipt) -> None:
    if receipt.error is not None:
        raise getattr(errors, receipt.error, ShoalError)(receipt.failure)

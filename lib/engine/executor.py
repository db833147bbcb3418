"""The exactly-once map over shards: rounds and waves of pending shards on an executor, then the audit.

An executor turns shards into receipts. There are three: Ray Data for mappers whose reading overlaps the model, the actor pool for
fused mappers (1 ms of the driver a shard in place of 11 to 17), and this process, without Ray, for small runs, notebooks and tests.
A ShoalError, which a person can mend, stops the run; any other failure of a shard is tried again, `ATTEMPTS` times over, and
then the shard is quarantined with its reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .. import errors
from ..cli.progress import Progress
from ..data.shards import Shard
from ..errors import RunError, ShoalError
from . import dispatch, ray_data
from .actor_pool import shared_pool
from .lease import ALL, ShardSlice
from .mapper import AnyMapper, FusedMapper, Mapper, Receipt, ShardRunner, Stage, Tables
from .parts import Part
from .run import Run, audit, missing, write_quarantine
from .workers import WorkerPlan

ATTEMPTS = 3  # rounds over the shards that failed
# Shards of a wave, at least. Driver cost a shard: 7-16 kB and 11-17 ms on Ray Data; with the actor pool 5 kB and 1 ms.
WAVE = 4000
WAVE_A_WORKER = 16  # and for each worker: all wait for a wave's last shard, and Ray Data starts anew
WAVE_RANGES = 100_000  # file ranges of a wave, at most; 0.9 kB each in the driver


@dataclass
class Outcome:
    """The end of a run: every part (empty while shards are missing), and shards given up on with their reasons.

    elsewhere: shards still missing that belong to other drivers' slices. notes: sentences for the report.
    """

    parts: list[Part]
    quarantined: dict[int, str]
    progress: Progress
    elsewhere: int = 0
    notes: tuple[str, ...] = ()


def execute(
    mapper: AnyMapper,
    run: Run,
    workers: WorkerPlan,
    progress: Progress,
    pending: Sequence[int],
    shard_slice: ShardSlice = ALL,
    check_lease: Callable[[], None] = lambda: None,
) -> Outcome:
    """Do the pending shards, which are all that are missing of the slice; audit when no other is missing either.

    check_lease: raises when another driver has taken the slice over. Raises ShoalError; finished shards stay finished.
    """
    parts: dict[int, Part] = {}
    reasons: dict[int, str] = {}
    todo, run_shards = list(pending), _executor_of(mapper, workers)
    with progress.shown(), shared_pool():  # one actor pool for all waves and rounds
        for attempt in range(ATTEMPTS):
            # Alone on its worker in the last round, a shard can no longer be a bystander of another's crash.
            in_flight = 1 if attempt == ATTEMPTS - 1 else 2
            reasons = dict.fromkeys(todo, dispatch.DIED)
            for wave in _waves(run.shards(todo), max(WAVE, WAVE_A_WORKER * workers.maximum), WAVE_RANGES):
                check_lease()
                stage = Stage(mapper, run.folder, run.part_names([shard.number for shard in wave]))
                for receipt in run_shards(stage, wave, workers, in_flight):
                    check_lease()
                    _note(receipt, parts, reasons, progress)
            todo = sorted(reasons)
            if not todo:
                break
    check_lease()
    absent = set(missing(run)) if reasons or shard_slice != ALL else set()
    quarantined = {number: ray_data.LAST_ERROR.explain(why) for number, why in reasons.items() if number in absent}
    elsewhere = {number for number in absent if not shard_slice.has(number)}
    write_quarantine(run.folder, quarantined, elsewhere)
    return Outcome([] if quarantined or elsewhere else audit(run, parts), quarantined, progress, len(elsewhere))


def _executor_of(mapper: AnyMapper, workers: WorkerPlan) -> Callable[..., Iterator[Receipt]]:
    if workers.in_process:
        return _run_here
    return dispatch.run_shards if isinstance(mapper, FusedMapper) else ray_data.run_shards


def _run_here(stage: Stage, shards: Sequence[Shard], workers: WorkerPlan, in_flight: int) -> Iterator[Receipt]:
    """A receipt of each shard, in order, without Ray. Raises RunError when the mapper cannot be loaded."""
    try:
        runner = ShardRunner(stage)
    except RuntimeError as error:
        raise RunError(f"the model could not be loaded: {error}") from error
    yield from map(runner.run, shards)


def sample(mapper: Mapper, shards: Sequence[Shard], workers: WorkerPlan) -> list[Tables]:
    """The tables that a mapper's loaded model makes of a few shards; nothing is published. Raises RunError when one fails."""
    results = []
    samples = _sample_here(mapper, shards) if workers.in_process else ray_data.sample(mapper, shards, workers)
    for receipt, tables in samples:
        _raise_if_final(receipt)
        if receipt.failure:
            raise RunError(f"the sample failed: {receipt.failure}")
        results.append(tables)
    return results


def _sample_here(mapper: Mapper, shards: Sequence[Shard]) -> Iterator[tuple[Receipt, Tables]]:
    """A receipt and the tables of each shard, without Ray; the first failure is the last."""
    model: Callable[[Tables], Tables] | None = None
    for shard in shards:
        receipt, tables = Receipt(shard.number), {}
        with receipt.catching():
            model = model or mapper.load()
            tables = model(mapper.read(shard)[0])
        yield receipt, tables


def _waves(shards: Iterator[Shard], max_shards: int, max_ranges: int) -> Iterator[list[Shard]]:
    """Split shards into waves of at most `max_shards` shards or `max_ranges` file ranges (one shard alone may exceed the latter)."""
    wave: list[Shard] = []
    ranges = 0
    for shard in shards:
        if wave and (len(wave) == max_shards or ranges + len(shard.ranges) > max_ranges):
            yield wave
            wave, ranges = [], 0
        wave.append(shard)
        ranges += len(shard.ranges)
    if wave:
        yield wave


def _note(receipt: Receipt, parts: dict[int, Part], reasons: dict[int, str], progress: Progress) -> None:
    """Move a shard from the reasons to the parts, or note why it failed."""
    _raise_if_final(receipt)
    if receipt.failure is not None or receipt.part is None:
        reasons[receipt.shard] = receipt.failure or "no part was written"
        progress.failures += 1
        return
    parts[receipt.shard] = Part(**receipt.part)
    if reasons.pop(receipt.shard, None) is not None:
        progress.add(receipt.counts, receipt.seconds, receipt.worked_from)


def _raise_if_final(receipt: Receipt) -> None:
    """Raise the ShoalError of a worker again: it crosses processes by its class name."""
    if receipt.error is not None:
        raise getattr(errors, receipt.error, ShoalError)(receipt.failure)

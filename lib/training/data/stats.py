"""Counts of a training plan, from the facts of its parts; and refusals of data that cannot be trained on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InputError
from .pairs import NO_NEGATIVES, count_reason
from .schedule import Stream

SHOWN = 3  # reasons that a message names


@dataclass(frozen=True)
class Bad:
    """Rows left out for one kind of reason; `first`: the source of the first of them, `reason`: its reason in full."""

    count: int
    first: str
    reason: str


@dataclass(frozen=True)
class DatasetCounts:
    """Usable rows of a dataset, and its batches in the first pass."""

    rows: int
    batches: int


@dataclass(frozen=True)
class Counts:
    """rows = usable + the bad ones; usable = rows of the first pass's batches + left_over.

    dropped_negatives: texts, of usable rows, that were empty or one of the row's positives. notes: sentences for a
    report, on datasets that give no batch.
    """

    rows: int
    usable: int
    bad: dict[str, Bad]
    dropped_negatives: int
    left_over: int
    datasets: dict[str, DatasetCounts]
    notes: tuple[str, ...]


def merge_facts(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of an entry's parts as one; `sets` by (dataset, in_batch): [rows, rows with negatives]."""
    total: dict[str, Any] = {"rows": 0, "dropped": 0, "bad": {}, "sets": {}}
    for each in facts:
        total["rows"] += each["rows"]
        total["dropped"] += each["dropped"]
        for number, source, reason in each["bad"].values():
            count_reason(total["bad"], reason, number, source)
        for dataset, in_batch, rows, negatives in each["sets"]:
            counts = total["sets"].setdefault((dataset, in_batch), [0, 0])
            counts[0] += rows
            counts[1] += negatives
    return total


def check_rows(name: str, pairs: Mapping[str, Any], global_batch: int) -> None:
    """Raises InputError for an entry without a usable row, or without a dataset that fills a batch.

    pairs: the result of `merge_facts`.
    """
    usable = sum(rows for rows, _ in pairs["sets"].values())
    if not usable:
        ranked = sorted(pairs["bad"].items(), key=lambda item: -item[1][0])
        reasons = "; ".join(f"{n:,} rows: {why} (first {first})" for _, (n, first, why) in ranked[:SHOWN])
        raise InputError(
            f"--data {name}: none of its {pairs['rows']:,} rows can be used: {reasons}. Mend or leave it out"
        )
    most = max(rows for rows, _ in pairs["sets"].values())
    if most < global_batch:
        many = len(pairs["sets"]) > 1
        what = f"the largest of its {len(pairs['sets'])} datasets has {most:,}" if many else f"it has {usable:,}"
        raise InputError(
            f"--data {name} gives no batch: a global batch is {global_batch:,} rows of one dataset, and {what} usable "
            f"rows. Lower --batch to {most:,} or less, add rows, or leave it out"
        )


def check_batches(name: str, streams: Iterable[Stream], pairs: Mapping[str, Any], global_batch: int) -> None:
    """Raises InputError for an entry whose rows fill no batch although there are enough."""
    if any(len(stream.batches(0)) for stream in streams):
        return
    usable = sum(rows for rows, _ in pairs["sets"].values())
    raise InputError(
        f"--data {name} gives no batch: of its {usable:,} usable rows no {global_batch:,} could be put together in which "
        "no text stands twice (or too few of them have negatives). Lower --batch, set in_batch_negatives to false "
        "in rows that share their texts, or leave the entry out; and choose a new --output"
    )


def count(
    pairs: Mapping[str, Mapping[str, Any]], batched: Sequence[Mapping[str, Any]], streams: Sequence[Stream], size: int
) -> Counts:
    """The counts of both maps. pairs: facts by entry; batched: facts of each part; size: global batch."""
    bad: dict[str, list[Any]] = {}
    rows: dict[str, int] = {}
    for entry in pairs.values():
        for number, source, reason in entry["bad"].values():
            count_reason(bad, reason, number, source)
        for (dataset, _), (usable, _) in entry["sets"].items():
            rows[dataset] = rows.get(dataset, 0) + usable
    left_over = 0
    for part in batched:
        for each in part["sets"] if part["pass"] == 0 else []:
            left_over += each["left_over"]
            if each["left_out"]:
                count_reason(bad, NO_NEGATIVES, each["left_out"], each["first"])
                rows[each["dataset"]] -= each["left_out"]
    batches = dict.fromkeys(rows, 0)
    for stream in streams:
        batches[stream.dataset] += len(stream.batches(0))
    notes = [
        f"dataset {name} gives no batch: it has {rows[name]:,} usable rows, and a global batch takes {size:,}"
        + (" that have no text in common" if rows[name] >= size else "")
        for name in sorted(rows)
        if not batches[name]
    ]
    return Counts(
        rows=sum(entry["rows"] for entry in pairs.values()),
        usable=sum(rows.values()),
        bad={kind: Bad(*entry) for kind, entry in sorted(bad.items())},
        dropped_negatives=sum(entry["dropped"] for entry in pairs.values()),
        left_over=left_over,
        datasets={name: DatasetCounts(rows[name], batches[name]) for name in sorted(rows)},
        notes=tuple(notes),
    )

"""A measured corpus as an immutable plan of shards.

A Shard is the unit of work, retry, commit and resume: a list of slices, each a range of one file's units (rows, or
bytes of a plain line file). Small files share a shard, long files are cut; both depend on the files alone, so the same
corpus always gives the same shards, and a grown corpus gives the old shards and some more.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..storage.listing import InputFile
from .corpus import Corpus
from .formats import Measure

UNREADABLE = "unreadable file: "
PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("path", pa.string()),
        ("name", pa.string()),  # path below the input
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("rows", pa.int64()),  # -1 where only reading tells
        ("size", pa.int64()),  # of the file, bytes
        ("tag", pa.string()),  # of the file: etag or modification time; empty where only the size must hold
        ("error", pa.string()),  # why the file could not be measured; such a file is one row
    ]
)


@dataclass(frozen=True)
class FileRange:
    """A range of one file's units, with the file's size (bytes) and tag at the time of the plan."""

    path: str
    name: str
    start: int
    stop: int
    rows: int
    size: int
    tag: str
    error: str | None


@dataclass(frozen=True)
class Shard:
    number: int
    slices: tuple[FileRange, ...]

    @property
    def rows(self) -> int:
        """Rows the plan expects, or -1 where only reading tells."""
        counts = [piece.rows for piece in self.slices]
        return -1 if -1 in counts else sum(counts)

    @property
    def key(self) -> str:
        """12 hex digits that depend on what the shard reads and nothing else."""
        return hashlib.sha256(repr(self.slices).encode()).hexdigest()[:12]


def cut_shards(corpus: Corpus, shard_rows: int, first_shard: int = 0) -> pa.Table:
    """The plan: one row a slice (PLAN_SCHEMA), shards filled in file order with about `shard_rows` rows each."""
    rows: list[tuple[Any, ...]] = []
    shard, room = first_shard, float(shard_rows)
    for file, measure in zip(corpus.files, corpus.measures, strict=True):
        error = UNREADABLE + measure if isinstance(measure, str) else None
        length = Measure(1, 1.0, True, 0.0, corpus.schema) if isinstance(measure, str) else measure
        start = 0
        while start < length.units:
            if room < 1 or (room < shard_rows / 2 and (length.units - start) * length.unit_rows > room):
                shard, room = shard + 1, float(shard_rows)
            stop = _end_of_piece(length, start, room)
            count = (stop - start) * length.unit_rows
            exact = stop - start if length.exact else -1
            rows.append((shard, file.path, file.name, start, stop, exact, file.size, file.tag, error))
            start, room = stop, room - count
    columns = zip(*rows, strict=True) if rows else [[]] * len(PLAN_SCHEMA)
    return pa.table([pa.array(values, f.type) for values, f in zip(columns, PLAN_SCHEMA, strict=True)], PLAN_SCHEMA)


def _end_of_piece(measure: Measure, start: int, rows: float) -> int:
    """Where a piece of at most about `rows` rows ends: at a break if one lies in its second half."""
    stop = min(measure.units, start + max(1, int(rows / measure.unit_rows)))
    place = bisect_right(measure.breaks, stop)
    near = measure.breaks[place - 1] if place else 0
    return near if stop < measure.units and near > start + (stop - start) // 2 else stop


def count_shards(plan: pa.Table) -> int:
    """Shards of a plan; they are numbered from 0 without a gap."""
    return pc.max(plan["shard"]).as_py() + 1 if plan.num_rows else 0


def shards(plan: pa.Table, numbers: Sequence[int] | None = None) -> Iterator[Shard]:
    """The plan's shards in order, or only those named. Memory: one Shard at a time."""
    if numbers is not None:
        plan = plan.filter(pc.is_in(plan["shard"], pa.array(numbers, pa.int64())))
    current: list[FileRange] = []
    number = -1
    for batch in plan.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            owner = row.pop("shard")
            if owner != number and current:
                yield Shard(number, tuple(current))
                current = []
            number = owner
            current.append(FileRange(**row))
    if current:
        yield Shard(number, tuple(current))


def tables_of(plan: pa.Table, source: str) -> list[pa.Table]:
    """The plan of each shard, with the name of a source before its files' names: shards of several sources are told apart."""
    names = pa.array([f"{source}/{name}" for name in plan["name"].to_pylist()], pa.string())
    plan = plan.set_column(PLAN_SCHEMA.get_field_index("name"), PLAN_SCHEMA.field("name"), names)
    return [plan.filter(pc.equal(plan["shard"], number)) for number in range(count_shards(plan))]


def of_source(shard: Shard, source: str) -> Shard:
    """A shard's slices of one source, under the names that their files have there."""
    mine = [piece for piece in shard.slices if piece.name.startswith(f"{source}/")]
    return Shard(shard.number, tuple(replace(piece, name=piece.name.removeprefix(f"{source}/")) for piece in mine))


def numbered(tables: Sequence[pa.Table]) -> pa.Table:
    """The plan with a shard for each table."""
    numbers = [pa.array([number] * len(table), pa.int64()) for number, table in enumerate(tables)]
    return pa.concat_tables(
        [table.set_column(0, PLAN_SCHEMA.field(0), column) for table, column in zip(tables, numbers, strict=True)]
    )


def untagged(plan: pa.Table) -> pa.Table:
    """Of parts of ours: one that is published again is the same part, whatever the store says of it."""
    tags = pa.array([""] * len(plan), pa.string())
    return plan.set_column(PLAN_SCHEMA.get_field_index("tag"), PLAN_SCHEMA.field("tag"), tags)


def changed_files(plan: pa.Table, files: Sequence[InputFile]) -> list[str]:
    """Sentences naming each planned file that is gone or no longer what it was."""
    now = {file.path: file for file in files}
    complaints = []
    for row in plan.group_by(["path", "size", "tag"], use_threads=False).aggregate([]).to_pylist():
        file = now.get(row["path"])
        if file is None:
            complaints.append(f"{row['path']} is gone")
        elif (file.size, file.tag) != (row["size"], row["tag"]):
            complaints.append(f"{row['path']} has changed (was {row['size']:,} bytes, is {file.size:,})")
    return complaints


def sample_shards(plan: pa.Table, count: int, rows: int) -> list[Shard]:
    """About the first `rows` rows of each of `count` shards spread evenly over the plan."""
    last = count_shards(plan) - 1
    numbers = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    return [_head(shard, rows) for shard in shards(plan, numbers)]


def _head(shard: Shard, rows: int) -> Shard:
    piece = shard.slices[0]
    # A byte range is cut at about 1 KiB a row; too many or few rows of a sample do no harm.
    units = rows if piece.rows >= 0 else rows << 10
    stop = min(piece.stop, piece.start + units)
    return Shard(shard.number, (replace(piece, stop=stop, rows=stop - piece.start if piece.rows >= 0 else -1),))

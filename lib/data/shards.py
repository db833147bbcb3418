"""A measured corpus as an immutable plan of shards.

A Shard is the unit of work, retry, commit and resume: some file ranges, each of one file's units (rows, or bytes of a plain
line file). Small files share a shard, long files are cut; both depend on the files alone. So the same corpus always gives the
same shards, and a grown corpus gives the old shards and some more.
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
        ("rows", pa.int64()),  # -1 where they are known only after reading
        ("size", pa.int64()),  # bytes of the file
        ("tag", pa.string()),  # etag or modification time of the file; empty where only its size is checked
        ("error", pa.string()),  # the reason why the file cannot be measured; such a file is one row
        ("source", pa.string()),  # which of several inputs of a joined job; null for a single input
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
    source: str | None = None  # name of one of several inputs


@dataclass(frozen=True)
class Shard:
    """The unit of work: file ranges whose rows follow each other. number: its place in the plan."""

    number: int
    ranges: tuple[FileRange, ...]

    @property
    def rows(self) -> int:
        """Rows that the plan expects, or -1 where they are known only after reading."""
        counts = [each.rows for each in self.ranges]
        return -1 if -1 in counts else sum(counts)

    @property
    def key(self) -> str:
        """12 hex digits that depend on what the shard reads and nothing else: names of parts, and seeds of samples.

        The hashed text is fixed, with the words of the first version: a new field or name of a class must not change it.
        """
        texts = [_key_text(each) for each in self.ranges]
        text = f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _key_text(part: FileRange) -> str:
    """The part of a key's text that stands for one range."""
    name = part.name if part.source is None else f"{part.source}/{part.name}"
    return (
        f"Slice(path={part.path!r}, name={name!r}, start={part.start!r}, stop={part.stop!r}, rows={part.rows!r}, "
        f"size={part.size!r}, tag={part.tag!r}, error={part.error!r})"
    )


def cut_shards(corpus: Corpus, shard_rows: int, first_shard: int = 0) -> pa.Table:
    """Cut a corpus into a plan: a row a file range (PLAN_SCHEMA), shards of about `shard_rows` rows each, in the order of files."""
    rows: list[tuple[Any, ...]] = []
    shard, room = first_shard, float(shard_rows)
    for file, measure in zip(corpus.files, corpus.measures, strict=True):
        error = UNREADABLE + measure if isinstance(measure, str) else None
        length = Measure(1, 1.0, True, 0.0, corpus.schema) if isinstance(measure, str) else measure
        start = 0
        while start < length.units:
            if room < 1 or (room < shard_rows / 2 and (length.units - start) * length.unit_rows > room):
                shard, room = shard + 1, float(shard_rows)
            stop = _end_of_range(length, start, room)
            count = (stop - start) * length.unit_rows
            exact = stop - start if length.exact else -1
            rows.append((shard, file.path, file.name, start, stop, exact, file.size, file.tag, error, None))
            start, room = stop, room - count
    columns = zip(*rows, strict=True) if rows else [[]] * len(PLAN_SCHEMA)
    return pa.table([pa.array(values, f.type) for values, f in zip(columns, PLAN_SCHEMA, strict=True)], PLAN_SCHEMA)


def _end_of_range(measure: Measure, start: int, rows: float) -> int:
    """The end of a range of at most about `rows` rows: a break if one lies in its second half."""
    stop = min(measure.units, start + max(1, int(rows / measure.unit_rows)))
    place = bisect_right(measure.breaks, stop)
    near = measure.breaks[place - 1] if place else 0
    return near if stop < measure.units and near > start + (stop - start) // 2 else stop


def count_shards(plan: pa.Table) -> int:
    """The number of shards of a plan; they are numbered from 0 without a gap."""
    return pc.max(plan["shard"]).as_py() + 1 if plan.num_rows else 0


def shards(plan: pa.Table, numbers: Sequence[int] | None = None) -> Iterator[Shard]:
    """Iterate over the shards of a plan, in order, or over those of some numbers. Memory: one Shard."""
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
    """The plan of each shard, its ranges marked as ranges of one source, to be joined with shards of other sources."""
    plan = _with_value(plan, "source", source)
    return [plan.filter(pc.equal(plan["shard"], number)) for number in range(count_shards(plan))]


def of_source(shard: Shard, source: str) -> Shard:
    """The shard's ranges of one source."""
    return Shard(shard.number, tuple(each for each in shard.ranges if each.source == source))


def number_shards(tables: Sequence[pa.Table]) -> pa.Table:
    """Join tables into one plan with a shard for each table, numbered from 0."""
    return pa.concat_tables([_with_value(table, "shard", number) for number, table in enumerate(tables)])


def remove_tags(plan: pa.Table) -> pa.Table:
    """Leave out the tags of our own parts: a part that is published again is the same, though the store gives it another tag."""
    return _with_value(plan, "tag", "")


def _with_value(plan: pa.Table, column: str, value: Any) -> pa.Table:
    """The plan with one value in all rows of a column."""
    field = PLAN_SCHEMA.field(column)
    return plan.set_column(PLAN_SCHEMA.get_field_index(column), field, pa.array([value] * len(plan), field.type))


def changed_files(plan: pa.Table, files: Sequence[InputFile]) -> list[str]:
    """A sentence for each planned file that is missing or has changed."""
    now = {file.path: file for file in files}
    sentences = []
    for row in plan.group_by(["path", "size", "tag"], use_threads=False).aggregate([]).to_pylist():
        file = now.get(row["path"])
        if file is None:
            sentences.append(f"{row['path']} is gone")
        elif (file.size, file.tag) != (row["size"], row["tag"]):
            sentences.append(f"{row['path']} has changed (was {row['size']:,} bytes, is {file.size:,})")
    return sentences


def sample_shards(plan: pa.Table, count: int, rows: int) -> list[Shard]:
    """About the first `rows` rows of each of `count` shards spread evenly over the plan."""
    last = count_shards(plan) - 1
    numbers = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    return [_head(shard, rows) for shard in shards(plan, numbers)]


def _head(shard: Shard, rows: int) -> Shard:
    """About the first `rows` rows of a shard, of its first range."""
    first = shard.ranges[0]
    # A byte range is cut at about 1 KiB a row; too many or few rows of a sample do no harm.
    units = rows if first.rows >= 0 else rows << 10
    stop = min(first.stop, first.start + units)
    return Shard(shard.number, (replace(first, stop=stop, rows=stop - first.start if first.rows >= 0 else -1),))

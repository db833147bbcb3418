"""The second map of a training plan: global batches from buckets of checked pairs.

A batch is of one dataset, and no text stands in two of its rows, so that what one row calls a negative is never what
another calls a positive. Every pass over a bucket draws and packs anew, from the seed and the bucket alone.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import as_one_array, read_rows
from ...data.shards import Shard
from ...engine.mapper import FusedMapper, Result
from ...engine.shuffle import REASON
from .list_columns import as_lists
from .pairs import KEY_LISTS, NUMBER_LISTS, PAIRS, TEXT_LISTS

BATCHES = pa.schema(
    [
        ("dataset", pa.string()),
        ("in_batch", pa.bool_()),  # whether passages of other rows are negatives
        ("query", pa.large_string()),
        ("prompt", pa.string()),
        ("passages", TEXT_LISTS),  # the positive first; as many in every row of a batch
        ("query_key", pa.int64()),
        ("passage_keys", KEY_LISTS),
        ("positive_keys", KEY_LISTS),  # of all the row's positives
        ("teacher", NUMBER_LISTS),  # a score for each passage, or null
        ("source", pa.string()),
    ]
)
DRAWN_ROWS = 20_000  # a draw at a time: bounds the memory of the shuffle
RANDOM_BITS = 40  # below the row number in the shuffle's sort keys
Set = tuple[str, str, bool]  # entry, dataset, in_batch: what a batch is of


def generator(*words: Any) -> np.random.Generator:
    """Random numbers that depend on the words and nothing else."""
    digest = hashlib.sha256(json.dumps(words).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def draw(counts: np.ndarray, wanted: int, random: np.random.Generator) -> np.ndarray:
    """Random positions in each list without replacement, int64 [n, wanted]. counts: the lists' lengths, int64 [n], none 0.

    A list shorter than `wanted` is repeated until it is long enough. Sorting by (row, random number) shuffles
    each row's list alone; the first `wanted` of it are the draw.
    """
    blocks = [np.zeros((0, wanted), np.int64)]
    for start in range(0, len(counts), DRAWN_ROWS):
        block = counts[start : start + DRAWN_ROWS]
        lengths = block * -(-wanted // block)
        stops = np.cumsum(lengths)
        starts, total = stops - lengths, int(stops[-1])
        rows = np.repeat(np.arange(len(block)), lengths)
        shuffled = np.argsort((rows << RANDOM_BITS) + random.integers(0, 1 << RANDOM_BITS, total), kind="stable")
        first = shuffled[starts[:, None] + np.arange(wanted)]
        blocks.append((first - starts[:, None]) % block[:, None])
    return np.concatenate(blocks)


class _OpenBatch:
    """A batch that is not full yet."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.texts: set[int] = set()  # keys of its queries and passages
        self.positives: set[int] = set()  # keys of all positives of its rows, drawn or not

    def offer(self, row: int, own: Sequence[int], positives: Sequence[int]) -> int | None:
        """Add the row, or return the key of a text that another row of the batch has too."""
        if not self.texts.isdisjoint(own) or not self.positives.isdisjoint(own):
            return next(key for key in own if key in self.texts or key in self.positives)
        if not self.texts.isdisjoint(positives):
            return next(key for key in positives if key in self.texts)
        self.rows.append(row)
        self.texts.update(own)
        self.positives.update(positives)
        return None

    def has(self, key: int) -> bool:
        return key in self.texts or key in self.positives


def pack(
    rows: Iterable[int], own: Sequence[Sequence[int]], positives: Sequence[Sequence[int]], size: int
) -> np.ndarray:
    """int64 [batches, size]: the rows in full batches, in none of which two rows have a text in common.

    own: by row, keys of its query and passages; positives: of all its positives. A row that shares a text with the open batch
    waits under that text's key, and a batch takes at most one row of a key: the work is near linear in the rows.
    """
    waiting: dict[int, deque[int]] = {}
    fresh = iter(rows)
    full: list[list[int]] = []

    def offer(batch: _OpenBatch, row: int) -> None:
        blocking = batch.offer(row, own[row], positives[row])
        if blocking is not None:
            waiting.setdefault(blocking, deque()).append(row)

    while True:
        batch = _OpenBatch()
        for key in list(waiting):
            if len(batch.rows) == size:
                break
            queue = waiting.pop(key)
            while queue and not batch.has(key) and len(batch.rows) < size:
                offer(batch, queue.popleft())
            if queue:  # to the end, behind the keys that this batch has not tried
                waiting.setdefault(key, deque()).extendleft(reversed(queue))
        while len(batch.rows) < size:
            row = next(fresh, None)
            if row is None:
                return np.array(full, np.int64).reshape(-1, size)
            offer(batch, row)
        full.append(batch.rows)


@dataclass(frozen=True)
class EntryShards:
    """The shards of one entry: each pass over its buckets, one after the other, from shard `first` on."""

    first: int
    buckets: int
    first_pass: int

    def bucket_and_pass(self, shard: int) -> tuple[int, int]:
        number, bucket = divmod(shard - self.first, self.buckets)
        return bucket, self.first_pass + number


@dataclass(frozen=True)
class BatchesMapper(FusedMapper):
    """The second map: one pass over one bucket; a part's facts are its entry, bucket, pass, and batches by dataset.

    with_negatives: the sets of which some row has negatives. shards: by entry.
    """

    seed: int
    global_batch: int
    group: int
    with_negatives: frozenset[Set]
    shards: Mapping[str, EntryShards]
    columns: pa.Schema
    storage: Mapping[str, Any]

    def load(self) -> Callable[[Shard], Result]:
        return self._make_batches

    def _read(self, shard: Shard) -> pa.Table:
        """The bucket's usable rows. Raises RuntimeError for a part that cannot be read whole: it is tried again."""
        names = [name for name in PAIRS.names if name != "dropped"]
        table = read_rows(shard, names, self.columns, self.storage)
        if table["_error"].null_count < table.num_rows or table.num_rows != shard.rows:
            raise RuntimeError(f"partitioned pairs cannot be read whole: {pc.drop_null(table['_error'])[:1]}")
        return table.filter(table[REASON].is_null()).select(names)

    def _make_batches(self, shard: Shard) -> Result:
        pairs, entry = self._read(shard), str(shard.ranges[0].source)
        bucket, number = self.shards[entry].bucket_and_pass(shard.number)
        tables, sets = [BATCHES.empty_table()], []
        for dataset, in_batch in _sets(pairs):
            of_set = pc.and_(pc.equal(pairs["dataset"], dataset), pc.equal(pairs["in_batch_negatives"], in_batch))
            random = generator(self.seed, number, entry, bucket, dataset, in_batch)
            group = self.group if (entry, dataset, in_batch) in self.with_negatives else 1
            rows, left_out = _with_negatives(pairs.filter(of_set), group)
            table = _batches(_columns(rows, group, random), in_batch, self.global_batch, random)
            tables.append(table)
            counts = {"batches": table.num_rows // self.global_batch, "left_over": rows.num_rows - table.num_rows}
            sets.append({"dataset": dataset, "in_batch": in_batch} | counts | left_out)
        table = pa.concat_tables(tables)
        groups = [self.global_batch] * (table.num_rows // self.global_batch)
        return Result(table, facts={"entry": entry, "bucket": bucket, "pass": number, "sets": sets}, groups=groups)


def _sets(pairs: pa.Table) -> list[tuple[str, bool]]:
    keys = ["dataset", "in_batch_negatives"]
    groups = pairs.group_by(keys, use_threads=False).aggregate([])
    return sorted((row["dataset"], row["in_batch_negatives"]) for row in groups.to_pylist())


def _with_negatives(pairs: pa.Table, group: int) -> tuple[pa.Table, dict[str, Any]]:
    """Rows that can fill a group of passages, and how many cannot, with the first of them."""
    if group == 1:
        return pairs, {"left_out": 0, "first": None}
    has = pc.greater(pc.list_value_length(pairs["negatives"]), 0)
    without = pairs.filter(pc.invert(has))
    first = without["source"][0].as_py() if without.num_rows else None
    return pairs.filter(has), {"left_out": without.num_rows, "first": first}


def _columns(pairs: pa.Table, group: int, random: np.random.Generator) -> pa.Table:
    """Each row with the passages that this pass draws for it, in the order of BATCHES."""
    good, bad = as_one_array(pairs["positives"]), as_one_array(pairs["negatives"])
    good_counts, bad_counts = _counts(good), _counts(bad)
    chosen = np.floor(random.random(len(good)) * good_counts).astype(np.int64)[:, None] + _starts(good_counts)
    values = [good.flatten(), bad.flatten()]
    keys = [as_one_array(pairs[name]).flatten().to_numpy() for name in ("positive_keys", "negative_keys")]
    if group > 1:
        drawn = draw(bad_counts, group - 1, random) + _starts(bad_counts) + len(values[0])
        chosen = np.concatenate([chosen, drawn], axis=1)
    flat, lengths = chosen.ravel(), np.full(len(chosen), group)
    data = {
        "dataset": pairs["dataset"].cast(pa.string()),
        "in_batch": pairs["in_batch_negatives"],
        "query": pairs["query"],
        "prompt": pairs["prompt"].cast(pa.string()),
        "passages": as_lists(pa.concat_arrays(values).take(pa.array(flat)), lengths),
        "query_key": pairs["query_key"],
        "passage_keys": as_lists(pa.array(np.concatenate(keys)[flat], pa.int64()), lengths),
        "positive_keys": pairs["positive_keys"],
        "teacher": _teacher(pairs, chosen, (good_counts, bad_counts)),
        "source": pairs["source"],
    }
    return pa.table(data, BATCHES)


def _counts(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def _starts(counts: np.ndarray) -> np.ndarray:
    """int64 [n, 1]: where each row's list begins."""
    return (np.cumsum(counts) - counts)[:, None]


def _teacher(pairs: pa.Table, chosen: np.ndarray, counts: tuple[np.ndarray, np.ndarray]) -> pa.Array:
    """Scores of the chosen passages; null for a row that has not all of them."""
    columns = [as_one_array(pairs[name]) for name in ("pos_scores", "neg_scores")]
    absent = [column.is_null().to_numpy(zero_copy_only=False) for column in columns]
    without = absent[0] | absent[1] if chosen.shape[1] > 1 else absent[0]
    flat = []
    for column, missing, count in zip(columns, absent, counts, strict=True):
        scores = np.zeros(int(count.sum()), np.float32)  # rows without scores keep 0, which a null hides
        scores[np.repeat(~missing, count)] = column.flatten().to_numpy()
        flat.append(scores)
    values = pa.array(np.concatenate(flat)[chosen.ravel()], pa.float32())
    return as_lists(values, np.full(len(chosen), chosen.shape[1]), without)


def _batches(table: pa.Table, in_batch: bool, size: int, random: np.random.Generator) -> pa.Table:
    """The rows that fill whole batches of `size`, batch by batch."""
    rows = random.permutation(table.num_rows)
    if not in_batch:  # a row is compared with its own passages alone: equal texts in other rows do no harm
        return table.take(pa.array(rows[: len(rows) // size * size]))
    query = table["query_key"].to_numpy()[:, None]
    passages = as_one_array(table["passage_keys"]).flatten().to_numpy().reshape(len(query), -1 if len(query) else 1)
    own = np.concatenate([query, passages], axis=1).tolist()
    return table.take(pa.array(pack(rows.tolist(), own, table["positive_keys"].to_pylist(), size).ravel()))

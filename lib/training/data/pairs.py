"""The first map of a training plan: read and check training pairs, and partition them into buckets.

Data for pretraining has single texts: each is the query and the positive of its row, and there are no negatives.
A row that cannot be used keeps its reason and is in no batch; the counts of a part are its facts: see `summary`.
"""

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import as_one_array, read_rows
from ...data.shards import Shard
from ...data.texts import as_text
from ...engine.mapper import FusedMapper, Result
from ...engine.shuffle import KEY, REASON, partition
from .list_columns import NO_REASON, ListColumn, as_lists, no_lists, score_lists, text_lists

NEEDED = ("query", "pos")
OPTIONAL = ("neg", "hn", "pos_scores", "neg_scores", "dataset", "prompt", "in_batch_negatives")
ALONE = ("text",)  # of data for pretraining, in place of NEEDED
ALONE_OPTIONAL = ("dataset", "in_batch_negatives")
NO_POSITIVE, EMPTY_POSITIVES, NO_NEGATIVES = "no positive", "only empty positives", "no negatives"
YES, NO = ("true", "1", "1.0"), ("false", "0", "0.0")
TEXT_LISTS, NUMBER_LISTS, KEY_LISTS = pa.list_(pa.large_string()), pa.list_(pa.float32()), pa.list_(pa.int64())
PAIRS = pa.schema(
    [
        ("query", pa.large_string()),
        ("positives", TEXT_LISTS),
        ("negatives", TEXT_LISTS),
        ("pos_scores", NUMBER_LISTS),
        ("neg_scores", NUMBER_LISTS),
        ("dataset", pa.large_string()),
        ("prompt", pa.large_string()),
        ("in_batch_negatives", pa.bool_()),
        ("source", pa.string()),
        ("query_key", pa.int64()),
        ("positive_keys", KEY_LISTS),
        ("negative_keys", KEY_LISTS),
        ("dropped", pa.int32()),  # negatives that were empty or one of the positives
        (REASON, pa.string()),
    ]
)


def text_keys(texts: pa.Array) -> np.ndarray:
    """int64 [n]: a hash of each text (large_string; null as ""), the same for texts that differ in case, white space or
    compatible characters (NFKC), and the same in every process."""
    from pandas.util import hash_array

    coded = pc.fill_null(texts, "").dictionary_encode()  # passages recur: each text is normalised once
    words = np.empty(len(coded.dictionary), object)
    words[:] = [_normal(text) for text in coded.dictionary.to_pylist()]
    keys = hash_array(words, categorize=False).view(np.int64)
    return keys[coded.indices.to_numpy(zero_copy_only=False)]


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_pairs(
    shard: Shard, columns: pa.Schema, odd: Mapping[str, pa.Schema], storage: Mapping[str, Any]
) -> list[pa.Table]:
    """The shard's rows in order, one table for neighbouring files of equal columns.

    columns: those that most files have, of NEEDED and OPTIONAL, or of ALONE and ALONE_OPTIONAL; odd: those of other files,
    by path.
    """
    tables: list[pa.Table] = []
    for each in shard.ranges:
        schema = odd.get(each.path, columns)
        table = read_rows(Shard(shard.number, (each,)), schema.names, schema, storage)
        if tables and tables[-1].schema == table.schema:
            tables[-1] = pa.concat_tables([tables[-1], table])
        else:
            tables.append(table)
    return tables


def as_pairs(table: pa.Table, entry: str) -> pa.Table:
    """Convert rows to PAIRS; a row that cannot be used gets a REASON. entry: the dataset of rows that name none."""
    rows = table.num_rows
    alone = ALONE[0] in table.column_names
    query, no_query = _query(table, ALONE[0] if alone else NEEDED[0])
    positives = _each_alone(query) if alone else _texts_of(table, NEEDED[1:])
    negatives = _texts_of(table, ("neg", "hn"))
    scores = [_scores_of(table, name, lists) for name, lists in (("pos_scores", positives), ("neg_scores", negatives))]
    dataset, bad_dataset = _text(table, "dataset")
    dataset = pc.if_else(pc.equal(pc.fill_null(dataset, ""), ""), pa.scalar(entry, pa.large_string()), dataset)
    prompt, bad_prompt = _text(table, "prompt", strip=False)
    in_batch, bad_flag = _flag(table)
    positives, scores[0], no_positive = _without_empty(positives, scores[0])
    query_keys, positive_keys, negative_keys = _keys(query, positives.values, negatives.values)
    fit = _fit_negatives(positives, positive_keys, negatives, negative_keys)
    dropped = negatives.counts
    negatives, scores[1] = _keep(negatives, scores[1], fit)
    reasons = [table["_error"], no_query, positives.reasons, no_positive, negatives.reasons]
    reasons += [lists.reasons for lists in scores] + [bad_dataset, bad_prompt, bad_flag]
    data = {
        "query": query,
        "positives": positives.column(),
        "negatives": negatives.column(),
        "pos_scores": scores[0].column(nulls=True),
        "neg_scores": scores[1].column(nulls=True),
        "dataset": dataset,
        "prompt": prompt,
        "in_batch_negatives": in_batch,
        "source": as_one_array(table["_source"]),
        "query_key": pa.array(query_keys, pa.int64()),
        "positive_keys": as_lists(pa.array(positive_keys, pa.int64()), positives.counts),
        "negative_keys": as_lists(pa.array(negative_keys[fit], pa.int64()), negatives.counts),
        "dropped": pa.array(dropped - negatives.counts, pa.int32()),
        REASON: pc.coalesce(*map(as_one_array, reasons)) if rows else pa.nulls(0, pa.string()),
    }
    return pa.table(data, PAIRS)


def _text(table: pa.Table, name: str, strip: bool = True) -> tuple[pa.Array, pa.Array]:
    """Texts (large_string) and reasons of a column that may be missing."""
    nothing = pa.nulls(table.num_rows, pa.string())
    if name not in table.column_names:
        return nothing.cast(pa.large_string()), nothing
    array = as_one_array(table[name])
    if pa.types.is_nested(array.type):
        unfit = pc.if_else(array.is_null(), NO_REASON, f"{name} is {array.type}, not text")
        return nothing.cast(pa.large_string()), unfit
    texts, reasons = as_text(array)
    return (pc.utf8_trim_whitespace(texts) if strip else texts), reasons


def _query(table: pa.Table, name: str) -> tuple[pa.Array, pa.Array]:
    texts, reasons = _text(table, name)
    empty = pc.if_else(pc.fill_null(pc.equal(texts, ""), False), f"empty {name}", NO_REASON)
    return texts, pc.coalesce(reasons, pc.if_else(texts.is_null(), f"no {name}", empty))


def _each_alone(texts: pa.Array) -> ListColumn:
    absent = texts.is_null().to_numpy(zero_copy_only=False)
    return ListColumn(texts.drop_null(), (~absent).astype(np.int64), absent, pa.nulls(len(texts), pa.string()))


def _texts_of(table: pa.Table, names: tuple[str, ...]) -> ListColumn:
    """Lists of stripped texts from the first of the columns that has some in a row."""
    columns = [text_lists(table[name], name) for name in names if name in table.column_names]
    lists = columns[0] if columns else no_lists(table.num_rows, pa.large_string())
    for other in columns[1:]:
        lists = _either(lists, other)
    return ListColumn(pc.utf8_trim_whitespace(lists.values), lists.counts, lists.absent, lists.reasons)


def _either(first: ListColumn, second: ListColumn) -> ListColumn:
    """The rows of `first`, and where it has none those of `second`."""
    use = first.absent
    second = second.keep(use[second.rows])
    place = np.argsort(np.concatenate([first.rows, second.rows]), kind="stable")
    values = pa.concat_arrays([first.values, second.values]).take(pa.array(place))
    reasons = pc.if_else(pa.array(use), second.reasons, first.reasons)
    return ListColumn(values, first.counts + second.counts, use & second.absent, reasons)


def _scores_of(table: pa.Table, name: str, texts: ListColumn) -> ListColumn:
    """Scores of the texts; a row whose scores are not one for each text has a reason, and none."""
    lists = no_lists(table.num_rows, pa.float32())
    if name in table.column_names:
        lists = score_lists(table[name], name)
    wrong = ~lists.absent & (lists.counts != texts.counts)
    some = np.flatnonzero(wrong & lists.reasons.is_null().to_numpy(zero_copy_only=False))
    reasons = np.array(lists.reasons.to_pylist(), object)
    reasons[some] = [f"{name} has {lists.counts[i]} numbers for {texts.counts[i]} texts" for i in some]
    kept = lists.keep(~wrong[lists.rows])
    return ListColumn(kept.values, kept.counts, lists.absent | wrong, pa.array(reasons, pa.string()))


def _flag(table: pa.Table) -> tuple[pa.Array, pa.Array]:
    words, reasons = _text(table, "in_batch_negatives")
    words = pc.utf8_lower(pc.fill_null(words, "true"))
    no = pc.is_in(words, pa.array(NO, pa.large_string()))
    known = pc.or_(no, pc.is_in(words, pa.array(YES, pa.large_string())))
    return pc.invert(no), pc.coalesce(reasons, pc.if_else(known, NO_REASON, "in_batch_negatives is not true or false"))


def _filled(lists: ListColumn) -> np.ndarray:
    """bool, one a value: false for a null or empty text."""
    return pc.fill_null(pc.not_equal(lists.values, ""), False).to_numpy(zero_copy_only=False)


def _without_empty(texts: ListColumn, scores: ListColumn) -> tuple[ListColumn, ListColumn, pa.Array]:
    """Texts and their scores without empty texts, and a reason for each row that has none."""
    none = pa.array(texts.counts == 0)
    kept, scores = _keep(texts, scores, _filled(texts))
    emptied = pc.if_else(pa.array(kept.counts == 0), EMPTY_POSITIVES, NO_REASON)
    return kept, scores, pc.if_else(none, NO_POSITIVE, emptied)


def _keep(texts: ListColumn, scores: ListColumn, mask: np.ndarray) -> tuple[ListColumn, ListColumn]:
    """Only the texts where `mask`, and only their scores: where a row has scores, it has one a text."""
    scored = mask[~scores.absent[texts.rows]] if len(scores.values) else np.zeros(0, bool)
    return texts.keep(mask), scores.keep(scored)


def _keys(*texts: pa.Array) -> list[np.ndarray]:
    keys = text_keys(pa.concat_arrays([each.cast(pa.large_string()) for each in texts]))
    return np.split(keys, np.cumsum([len(each) for each in texts])[:-1])


def _fit_negatives(positives: ListColumn, good: np.ndarray, negatives: ListColumn, bad: np.ndarray) -> np.ndarray:
    """bool, one a negative: it is a text, and none of its row's positives."""
    _, codes = np.unique(np.concatenate([good, bad]), return_inverse=True)
    width = int(codes.max(initial=0)) + 1  # (row, text) as one number: rows of a shard times its texts fit 63 bits
    mine = positives.rows * width + codes[: len(good)]
    return _filled(negatives) & ~np.isin(negatives.rows * width + codes[len(good) :], mine)


def summary(pairs: pa.Table) -> dict[str, Any]:
    """Facts of a part: rows; bad rows by reason with the first source; usable rows by dataset."""
    bad: dict[str, list[Any]] = {}
    reasons = pairs[REASON]
    wrong = pairs.filter(reasons.is_valid())
    for reason, source in zip(wrong[REASON].to_pylist(), wrong["source"].to_pylist(), strict=True):
        count_reason(bad, reason, 1, source)
    good = pairs.filter(reasons.is_null())
    has = pc.greater(pc.list_value_length(good["negatives"]), 0).cast(pa.int64())
    keys = ["dataset", "in_batch_negatives"]
    groups = good.select(keys).append_column("has", has).group_by(keys, use_threads=False)
    table = groups.aggregate([("has", "count"), ("has", "sum")])
    sets = [[r["dataset"], r["in_batch_negatives"], r["has_count"], r["has_sum"]] for r in table.to_pylist()]
    dropped = pc.sum(good["dropped"]).as_py() or 0
    return {"rows": pairs.num_rows, "bad": bad, "sets": sorted(sets), "dropped": dropped}


def count_reason(into: dict[str, list[Any]], reason: str, count: int, source: str) -> None:
    """Add `count` rows to a table of [count, first source, its whole reason] by what a reason begins with."""
    kind = reason.split(":")[0]
    entry = into.setdefault(kind, [0, source, reason])
    entry[0] += count


@dataclass(frozen=True)
class PartitionPairs(FusedMapper):
    """The first map: the rows of one --data entry, checked and partitioned; a part's facts are its `summary`.

    A dataset is whole in one bucket where a column names it; else rows go to buckets at random. columns, odd: see read_pairs.
    """

    entry: str
    seed: int
    buckets: int
    by_dataset: bool
    columns: pa.Schema
    odd: Mapping[str, pa.Schema]
    storage: Mapping[str, Any]

    def load(self) -> Callable[[Shard], Result]:
        return self._partition

    def _partition(self, shard: Shard) -> Result:
        tables = read_pairs(shard, self.columns, self.odd, self.storage)
        pairs = pa.concat_tables([PAIRS.empty_table(), *(as_pairs(table, self.entry) for table in tables)])
        keyed = pairs.append_column(KEY, self._key(pairs)).combine_chunks()
        rows, groups = partition(keyed, self.buckets)
        errors = rows.num_rows - rows[REASON].null_count
        return Result(rows, {"source_rows": rows.num_rows, "errors": errors}, summary(pairs), groups)

    def _key(self, pairs: pa.Table) -> pa.ChunkedArray:
        key = pairs["dataset"]
        if not self.by_dataset:
            source = pairs["source"].cast(pa.large_string())
            key = pc.binary_join_element_wise(
                pa.scalar(f"{self.seed} ", pa.large_string()), source, pa.scalar("", key.type)
            )
        return pc.if_else(pairs[REASON].is_null(), key, pa.scalar(None, key.type))

"""The second map: which rows share a batch, and which passages are drawn for each."""

import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.shards import FileRange, Shard
from lib.engine.parts import RUN, Part, read_facts
from lib.engine.publish import publish_part
from lib.storage.folder import Folder
from lib.training.data.batches import BatchesMapper, EntryShards, draw, generator, pack
from lib.training.data.pairs import PAIRS, as_pairs
from tests.support.training_plans import pairs, steps


def test_every_usable_row_is_in_one_batch_of_a_pass_or_left_over(make_plan, small_buckets):
    """No row is lost and none is used twice in a pass, over many buckets; rows = usable + bad, and usable = used + left over."""
    rows = [*pairs(203), {"query": "", "pos": "x"}]
    planned = make_plan({"a": rows}, epochs=2)
    counts, batches = planned.counts, steps(planned)
    first = pa.concat_tables(batches[: counts.datasets["a"].batches])["source"].to_pylist()

    assert len(set(first)) == len(first)
    assert len(first) + counts.left_over == counts.usable == 203
    assert counts.rows == 204
    assert {name: bad.count for name, bad in counts.bad.items()} == {"empty query": 1}
    assert len(os.listdir(os.path.join(planned.url, "batches-0"))) > 8
    assert all(batch.num_rows == 8 for batch in batches)


def test_a_batch_of_more_rows_than_a_row_group_of_other_parts_is_one_row_group(make_plan):
    """A global batch of 40,000 rows is read in one piece."""
    rows = [{"query": str(i), "pos": f"p{i}"} for i in range(40_001)]
    planned = make_plan({"a": rows}, global_batch=40_000, group=1)

    assert planned.steps == 1
    assert steps(planned)[0].num_rows == 40_000


TEXTS = st.lists(st.integers(0, 12), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(20, 26), TEXTS, TEXTS), max_size=40), st.integers(1, 5))
def test_no_text_stands_in_two_rows_of_a_batch(rows, size):
    """Keys of queries and passages are of one row of a batch, no passage is another row's positive, and no row is in two batches.

    Packing stops only where the rows that are left do not fit together as one more batch in their order.
    """
    positives = [good for _, good, _ in rows]
    own = [[query, good[0], *bad] for query, good, bad in rows]
    batches = pack(range(len(rows)), own, positives, size)

    assert len(set(batches.ravel().tolist())) == batches.size
    for batch in batches.tolist():
        for row in batch:
            others = [other for other in batch if other != row]
            for other in others:
                assert not set(own[row]) & (set(own[other]) | set(positives[other]))
    left = [row for row in range(len(rows)) if row not in batches]
    clean = [row for row in left if not any(set(own[row]) & {*own[o], *positives[o]} for o in left if o != row)]
    assert len(clean) < size


def test_packing_is_near_linear_where_one_text_is_in_most_rows():
    """Rows that share a text wait under it, and are not tried again for every batch."""
    reads = Counter()

    class Counted(list):
        def __getitem__(self, row):
            reads[row] += 1
            return super().__getitem__(row)

    own = Counted([[i, 1_000_000 if i % 10 else -i] for i in range(20_000)])
    batches = pack(range(20_000), own, own, 8)

    assert len(batches) > 0
    assert max(reads.values()) <= 8


def test_duplicates_come_apart_through_the_whole_plan(make_plan):
    """Two rows with one query or passage are never in one batch, even where case and spaces differ."""
    rows = []
    for i in range(120):
        positives = [f"positive {i}", f"SHARED  {i % 30}"]
        rows.append(
            {"query": f"Query {i // 2}", "pos": positives, "neg": [f"negative {i % 50}", f"shared {(i + 7) % 30}"]}
        )
    planned = make_plan({"a": rows}, group=3)
    assert planned.steps > 3
    for batch in steps(planned):
        columns = [batch[name].to_pylist() for name in ("query_key", "passage_keys", "positive_keys")]
        texts = [({query, *passages}, set(good)) for query, passages, good in zip(*columns, strict=True)]
        for i, (own, _) in enumerate(texts):
            assert all(not own & (other | good) for j, (other, good) in enumerate(texts) if i != j)


def test_rows_without_in_batch_negatives_may_share_their_texts(make_plan):
    """Where only a row's own passages count, labels that recur are no conflict; the two kinds are never in one batch."""
    label = [{"query": f"q{i}", "pos": f"label {i % 2}", "neg": f"label {1 - i % 2}"} for i in range(40)]
    rows = [row | {"in_batch_negatives": False} for row in label] + pairs(16, 100)
    planned = make_plan({"a": rows})
    flags = [set(batch["in_batch"].to_pylist()) for batch in steps(planned)]

    assert sorted(map(tuple, flags)) == [(False,)] * 5 + [(True,)] * 2


@pytest.mark.parametrize(("length", "wanted"), [(1, 5), (3, 5), (5, 5), (9, 5), (2, 1)])
def test_negatives_are_drawn_without_replacement_from_a_list_laid_end_to_end(length, wanted):
    """Each negative is drawn at most ceil(wanted / length) times, and each equally often over many rows."""
    drawn = draw(np.full(5000, length), wanted, generator("draws", length))

    assert drawn.shape == (5000, wanted)
    assert max(Counter(row).most_common(1)[0][1] for row in drawn.tolist()) <= -(-wanted // length)
    shares = np.bincount(drawn.ravel(), minlength=length) / drawn.size
    assert np.allclose(shares, 1 / length, atol=0.02)


def test_rows_without_negatives_are_left_out_where_others_have_some(make_plan):
    """A dataset in which no row has negatives is trained with positives alone; where some have, the others are left out."""
    planned = make_plan(
        {"some": [*pairs(16), *pairs(3, 50, negatives=0)], "none": pairs(16, 100, negatives=0)}, group=4
    )
    lengths = {
        batch["dataset"][0].as_py(): {len(row) for row in batch["passages"].to_pylist()} for batch in steps(planned)
    }

    assert lengths == {"some": {4}, "none": {1}}
    assert planned.counts.bad["no negatives"].count == 3
    assert planned.counts.bad["no negatives"].first.startswith("some.jsonl#")
    assert planned.counts.usable == 32


def test_teacher_scores_stay_with_their_passages(make_plan):
    """The score of each passage is the one that stood beside it, where texts are left out too; a row without all scores has none."""
    rows = []
    for i, row in enumerate(pairs(24, negatives=4)):
        row["neg"][1] = "" if i % 2 else row["pos"][0]
        scores = {"pos_scores": 100 + i, "neg_scores": [i, i + 0.25, i + 0.5, i + 0.75]}
        rows.append(row | (scores if i % 3 else {"pos_scores": [1.0]}))
    planned = make_plan({"a": rows}, group=4)
    seen = 0
    for row in [row for batch in steps(planned) for row in batch.to_pylist()]:
        number = int(row["query"].split()[1])
        if number % 3 == 0:
            assert row["teacher"] is None
            continue
        wanted = [number + int(text.split()[2]) * 0.25 for text in row["passages"][1:]]
        assert row["teacher"] == [100 + number, *wanted]
        seen += 1
    assert seen == 16
    assert planned.counts.dropped_negatives == 24


def test_a_text_that_recurs_waits_for_another_batch(make_plan):
    """No batch has a text twice, unless the rows say that others' passages are no negatives; and datasets stay apart."""
    rows = [{"text": f"Text {i // 2}", "dataset": "x"} for i in range(32)]
    loose = [{"text": "same", "dataset": "y", "in_batch_negatives": False}] * 8
    planned = make_plan({"a": rows + loose})
    texts = [{(row["dataset"], row["query"]) for row in batch.to_pylist()} for batch in steps(planned)]

    assert sorted(map(len, texts)) == [1, *[8] * (len(texts) - 1)]
    assert {name: (each.rows, each.batches) for name, each in planned.counts.datasets.items()} == {
        "x": (32, len(texts) - 1),
        "y": (8, 1),
    }


@pytest.mark.parametrize(("positives", "usable"), [(["p0", "p1", " "], 2), ([" ", " ", " "], 0)])
def test_a_bucket_that_fills_no_batch_has_an_empty_part(tmp_path, positives, usable):
    """A part without a row group is published and read like any other."""
    sources = {"_source": [f"f#{i}" for i in range(3)], "_error": pa.nulls(3, pa.string())}
    path = tmp_path / "part.parquet"
    pq.write_table(as_pairs(pa.table({"query": ["q0", "q1", "q2"], "pos": positives, **sources}), "a"), path)
    mapper = BatchesMapper(0, 8, 2, frozenset(), {"a": EntryShards(0, 1, 0)}, PAIRS, {})
    shard = Shard(0, (FileRange(str(path), path.name, 0, 3, 3, path.stat().st_size, "", None, "a"),))
    result = mapper.load()(shard)
    folder = Folder(str(tmp_path / "batches"))
    folder.publish(RUN, b"{}")
    part = publish_part(folder, "part-0.parquet", 0, result.table, {"rows": 0}, result.facts, result.groups)
    counts = {"batches": 0, "left_over": usable, "left_out": 0, "first": None}
    sets = [{"dataset": "a", "in_batch": True} | counts] if usable else []

    assert isinstance(part, Part)
    assert part.rows == 0
    assert read_facts(folder, [part]) == [{"entry": "a", "bucket": 0, "pass": 0, "sets": sets, "groups": []}]

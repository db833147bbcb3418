"""The training plan: which pairs become which batches, in which order, and what is refused. Without Ray."""

import json
import os
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.shards import FileRange, Shard
from lib.engine.parts import FACTS, RUN, Part, publish_part, read_facts
from lib.engine.shuffle import REASON
from lib.engine.workers import CpuWorkerOptions
from lib.errors import InputError, RunError, UsageError
from lib.storage.folder import Folder
from lib.training.data.batch_reader import BatchReader
from lib.training.data.batches import BatchesMapper, EntryShards, draw, generator, pack
from lib.training.data.job import DataOptions, plan
from lib.training.data.pairs import PAIRS, checked, text_keys
from lib.training.data.schedule import Stream, make_order
from lib.training.data.sources import Entry, parse_data, parse_weights

LOCAL = CpuWorkerOptions(executor="local")


def pairs(count, first=0, negatives=3, **more):
    rows = []
    for i in range(first, first + count):
        row = {"query": f"query {i}", "pos": [f"positive {i}"], "neg": [f"negative {i} {j}" for j in range(negatives)]}
        rows.append(row | more)
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make(tmp_path):
    """Plan rows (dicts, by name of the entry) with the given options; the plan, and where it is."""

    def run(rows, output="out", **options):
        words = []
        for name, entry in rows.items():
            path = tmp_path / f"{name}.jsonl"
            if not path.exists():
                write(path, entry)
            words.append(str(path))
        options = {"global_batch": 8, "group": 2} | options
        return plan(DataOptions(data=tuple(words), **options), Folder(str(tmp_path / output)), LOCAL)

    return run


def steps(planned):
    order = BatchReader(planned.url)
    return [order.read(step) for step in range(order.steps)]


def dealt(planned, name):
    folder = os.path.join(planned.url, f"pairs-{name}")
    parts = sorted(part for part in os.listdir(folder) if part.startswith("part-"))
    return pa.concat_tables([pq.read_table(os.path.join(folder, part)) for part in parts])


def files(planned):
    """The bytes of every part and of the order, by path."""
    found = {}
    for folder, _, names in os.walk(planned.url):
        for name in names:
            if name.startswith(("part-", "order")):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, planned.url)] = file.read()
    return found


def content(planned):
    """What `files` gives, apart from the hash in the name of a part, which is of the place of what it was made of."""
    found = {name[: name.rindex("-")]: data for name, data in files(planned).items() if "part-" in name}
    order = pq.read_table(os.path.join(planned.url, "order.parquet"))
    return found, [(row["part"].rpartition("-")[0], row["group"]) for row in order.to_pylist()]


@pytest.fixture
def small_buckets(monkeypatch):
    """Buckets of four batches, so that few rows make many."""
    monkeypatch.setattr("lib.training.data.sources.MIN_ROWS", 1)
    monkeypatch.setattr("lib.training.data.sources.BUCKET_BATCHES", 4)


def test_every_usable_row_is_in_one_batch_of_a_pass_or_left_over(make, small_buckets):
    """No row is lost and none is used twice in a pass, over many buckets; rows = usable + bad, and usable = used + left over."""
    rows = [*pairs(203), {"query": "", "pos": "x"}]
    planned = make({"a": rows}, epochs=2)
    counts, batches = planned.counts, steps(planned)
    first = pa.concat_tables(batches[: counts.datasets["a"].batches])["source"].to_pylist()

    assert len(set(first)) == len(first)
    assert len(first) + counts.left_over == counts.usable == 203
    assert counts.rows == 204
    assert {name: bad.count for name, bad in counts.bad.items()} == {"empty query": 1}
    assert len(os.listdir(os.path.join(planned.url, "batches-0"))) > 8
    assert all(batch.num_rows == 8 for batch in batches)


def test_a_batch_is_one_row_group_and_the_order_has_each_once(make):
    """Steps are numbered without a gap, each names a row group of its own, and a row group is exactly a global batch."""
    planned = make({"a": pairs(50), "b": pairs(40, 100)})
    order = pq.read_table(os.path.join(planned.url, "order.parquet"))
    groups = 0
    for name in set(order["part"].to_pylist()):
        metadata = pq.read_metadata(os.path.join(planned.url, name))
        assert {metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)} == {8}
        groups += metadata.num_row_groups

    assert planned.steps == order.num_rows == groups == 6 + 5
    assert order["step"].to_pylist() == list(range(11))
    assert len(set(zip(order["part"].to_pylist(), order["group"].to_pylist(), strict=True))) == 11
    for step, batch in enumerate(steps(planned)):
        assert set(batch["dataset"].to_pylist()) == {order["dataset"][step].as_py()}


def test_a_batch_of_more_rows_than_a_row_group_of_other_parts_is_one_row_group(make):
    """A global batch of 40,000 rows is read in one piece."""
    rows = [{"query": str(i), "pos": f"p{i}"} for i in range(40_001)]
    planned = make({"a": rows}, global_batch=40_000, group=1)

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
    """Rows that share a text wait under it, and are not asked again for every batch."""
    asked = Counter()

    class Counted(list):
        def __getitem__(self, row):
            asked[row] += 1
            return super().__getitem__(row)

    own = Counted([[i, 1_000_000 if i % 10 else -i] for i in range(20_000)])
    batches = pack(range(20_000), own, own, 8)

    assert len(batches) > 0
    assert max(asked.values()) <= 8


def test_texts_are_the_same_that_differ_in_case_space_or_width():
    """Keys are of normalised texts, and the same in every process."""
    keys = text_keys(pa.array(["Ａ  b", "a B ", "a\n b", "ab", None, ""], pa.large_string()))

    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert keys[4] == keys[5]
    assert text_keys(pa.array(["training pairs"], pa.large_string())).tolist() == [26582360159699040]


def test_duplicates_come_apart_through_the_whole_plan(make):
    """Two rows with one query or passage are never in one batch, even where case and spaces differ."""
    rows = []
    for i in range(120):
        positives = [f"positive {i}", f"SHARED  {i % 30}"]
        rows.append(
            {"query": f"Query {i // 2}", "pos": positives, "neg": [f"negative {i % 50}", f"shared {(i + 7) % 30}"]}
        )
    planned = make({"a": rows}, group=3)
    assert planned.steps > 3
    for batch in steps(planned):
        columns = [batch[name].to_pylist() for name in ("query_key", "passage_keys", "positive_keys")]
        found = [({query, *passages}, set(good)) for query, passages, good in zip(*columns, strict=True)]
        for i, (own, _) in enumerate(found):
            assert all(not own & (other | good) for j, (other, good) in enumerate(found) if i != j)


def test_rows_without_in_batch_negatives_may_share_their_texts(make):
    """Where only a row's own passages count, labels that recur are no conflict; the two kinds are never in one batch."""
    label = [{"query": f"q{i}", "pos": f"label {i % 2}", "neg": f"label {1 - i % 2}"} for i in range(40)]
    rows = [row | {"in_batch_negatives": False} for row in label] + pairs(16, 100)
    planned = make({"a": rows})
    flags = [set(batch["in_batch"].to_pylist()) for batch in steps(planned)]

    assert sorted(map(tuple, flags)) == [(False,)] * 5 + [(True,)] * 2


def test_the_same_seed_gives_the_same_bytes(make, small_buckets):
    """A plan depends on data, options and seed alone; another seed is another order, and each pass is drawn anew."""
    one, same, other = (make({"a": pairs(100)}, f"out{i}", seed=s, epochs=2) for i, s in enumerate((1, 1, 2)))
    sources = [[row for batch in steps(each) for row in batch["source"].to_pylist()] for each in (one, other)]
    passages = [[str(row) for batch in steps(one)[s] for row in batch["passages"].to_pylist()] for s in HALVES]

    assert content(one) == content(same)
    assert sources[0] != sources[1]
    assert passages[0] != passages[1]
    assert set(passages[0]) - set(passages[1])  # other negatives, not only another order


HALVES = (slice(0, 8), slice(-8, None))


@pytest.mark.parametrize(("there", "wanted"), [(1, 5), (3, 5), (5, 5), (9, 5), (2, 1)])
def test_negatives_are_drawn_without_replacement_from_a_list_laid_end_to_end(there, wanted):
    """Each negative is drawn at most ceil(wanted / there) times, and each equally often over many rows."""
    drawn = draw(np.full(5000, there), wanted, generator("draws", there))

    assert drawn.shape == (5000, wanted)
    assert max(Counter(row).most_common(1)[0][1] for row in drawn.tolist()) <= -(-wanted // there)
    shares = np.bincount(drawn.ravel(), minlength=there) / drawn.size
    assert np.allclose(shares, 1 / there, atol=0.02)


def test_rows_without_negatives_are_left_out_where_others_have_some(make):
    """A dataset in which no row has negatives is trained with positives alone; where some have, the others are left out."""
    planned = make({"some": [*pairs(16), *pairs(3, 50, negatives=0)], "none": pairs(16, 100, negatives=0)}, group=4)
    lengths = {
        batch["dataset"][0].as_py(): {len(row) for row in batch["passages"].to_pylist()} for batch in steps(planned)
    }

    assert lengths == {"some": {4}, "none": {1}}
    assert planned.counts.bad["no negatives"].count == 3
    assert planned.counts.bad["no negatives"].first.startswith("some.jsonl#")
    assert planned.counts.usable == 32


def test_teacher_scores_stay_with_their_passages(make):
    """The score of each passage is the one that stood beside it, where texts are left out too; a row without all scores has none."""
    rows = []
    for i, row in enumerate(pairs(24, negatives=4)):
        row["neg"][1] = "" if i % 2 else row["pos"][0]
        scores = {"pos_scores": 100 + i, "neg_scores": [i, i + 0.25, i + 0.5, i + 0.75]}
        rows.append(row | (scores if i % 3 else {"pos_scores": [1.0]}))
    planned = make({"a": rows}, group=4)
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


BAD = [
    ({"pos": "x"}, "no query"),
    ({"query": " ", "pos": "x"}, "empty query"),
    ({"query": "q"}, "no positive"),
    ({"query": "q", "pos": []}, "no positive"),
    ({"query": "q", "pos": ["", " ", None]}, "only empty positives"),
    ({"query": "q", "pos": {"text": "x"}}, "pos is a JSON object"),
    ({"query": "q", "pos": [1, 2]}, "pos is a list of other things than texts"),
    ({"query": "q", "pos": "x", "neg": [["y"]]}, "neg is a list of other things than texts"),
    ({"query": "q", "pos": "x", "pos_scores": [1, 2]}, "pos_scores has 2 numbers for 1 texts"),
    ({"query": "q", "pos": "x", "neg": ["y", "z"], "neg_scores": [1]}, "neg_scores has 1 numbers for 2 texts"),
    ({"query": "q", "pos": "x", "pos_scores": "high"}, "pos_scores is neither a number nor a list of numbers"),
    ({"query": "q", "pos": "x", "pos_scores": float("nan")}, "pos_scores is not finite"),
    ({"query": "q", "pos": "x", "pos_scores": 10**400}, "pos_scores is not finite"),
    ({"query": "q", "pos": "x", "in_batch_negatives": "perhaps"}, "in_batch_negatives is not true or false"),
]


def test_bad_rows_keep_their_reason_and_take_no_part(make):
    """Each row that cannot be used stands in a dealt part with its reason, and in no batch."""
    planned = make({"a": [*pairs(8), *(row for row, _ in BAD), [1]]})
    table = dealt(planned, "a")
    reasons = [reason for reason in table[REASON].to_pylist() if reason]

    assert table.num_rows == 8 + len(BAD) + 1
    for _, wanted in BAD:
        assert any(reason.startswith(wanted) for reason in reasons), wanted
    assert "not a JSON object but list" in reasons
    assert planned.counts.rows - planned.counts.usable == len(BAD) + 1
    assert {row for batch in steps(planned) for row in batch["query"].to_pylist()} == {f"query {i}" for i in range(8)}


def test_texts_and_lists_of_texts_are_the_same_in_every_format(tmp_path, make):
    """A positive as text in one file and as list in another, negatives under either name, columns that some files lack."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "a.jsonl", [{"query": "q0", "pos": "p0", "neg": "n0"}, {"query": "q1", "pos": ["p1"], "hn": ["n1"]}])
    tables = {
        "b": {"query": ["q2"], "pos": ["p2"], "neg": [["n2", ""]], "prompt": ["Find: "]},
        "c": {"query": ["q3"], "pos": pa.array([["p3"]], pa.large_list(pa.string())), "hn": ["n3"]},
        "d": {
            "query": ["q4"],
            "pos": pa.array(["p4"]).dictionary_encode(),
            "neg": [["n4"]],
            "neg_scores": [[2]],
            "pos_scores": [3],
        },
        "e": {"query": ["q5"], "pos": pa.array([["p5"]], pa.list_(pa.string(), 1)), "neg": [["n5"]], "extra": [1]},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    planned = plan(DataOptions(data=(str(folder),), global_batch=6, group=2), Folder(str(tmp_path / "out")), LOCAL)
    rows = sorted(steps(planned)[0].to_pylist(), key=lambda row: row["query"])

    assert [row["passages"] for row in rows] == [[f"p{i}", f"n{i}"] for i in range(6)]
    assert [row["prompt"] for row in rows] == [None, None, "Find: ", None, None, None]
    assert rows[4]["teacher"] == [3, 2]
    for pos in ([{"text": "p6"}], [[6]]):
        table = pa.table({"query": ["q6"], "pos": pos, "_source": ["f#0"], "_error": pa.nulls(1, pa.string())})
        assert checked(table, "f")[REASON].to_pylist() == [f"pos is {table['pos'].type}"]


@pytest.mark.parametrize("forms", [(["p0"], "p1"), ("p0", ["p1"])])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_positives_may_be_lists_in_one_file_and_texts_in_another(tmp_path, make, forms, ending):
    """Each file is looked at and read by its own types, whichever comes first, and all positives take part."""
    folder = tmp_path / "a"
    folder.mkdir()
    for i, pos in enumerate(forms):
        row = {"query": f"q{i}", "pos": pos, "neg": ["n", f"n{i}"][i]}
        if ending == "jsonl":
            write(folder / f"{i}.jsonl", [row])
        else:
            pq.write_table(pa.Table.from_pylist([row]), folder / f"{i}.parquet")
    options = DataOptions(data=(str(folder),), global_batch=2, group=2)
    planned = plan(options, Folder(str(tmp_path / "out")), LOCAL)

    assert planned.counts.bad == {}
    assert sorted(steps(planned)[0]["passages"].to_pylist()) == [["p0", "n"], ["p1", "n1"]]


@pytest.mark.parametrize("nothing", [None, [], [None], "absent"])
def test_negatives_may_be_null_in_some_rows(make, nothing):
    """A JSONL row with null negatives is a pair without any: left out with others that have some, no row that is bad."""
    rows = pairs(24)
    for row in rows[::3]:
        row["neg"] = nothing
        if nothing == "absent":
            del row["neg"]
    planned, alone = make({"a": rows}), make({"a": rows}, "alone", group=1)

    assert (planned.counts.usable, planned.steps) == (16, 2)
    assert {name: bad.count for name, bad in planned.counts.bad.items()} == {"no negatives": 8}
    assert (alone.counts.usable, alone.steps, alone.counts.bad) == (24, 3, {})


def test_texts_alone_are_rows_of_one_text(tmp_path, make):
    """Files with `text` and neither query nor pos, in any format: each row's text is its query and only passage."""
    folder = tmp_path / "texts"
    folder.mkdir()
    listed = '["a text", "that looks like a list"]'
    write(folder / "a.jsonl", [{"text": "one", "neg": "not read"}, {"text": listed, "id": 7}])
    pq.write_table(pa.table({"text": [" two "], "title": ["not read"]}), folder / "b.parquet")
    pq.write_table(pa.table({"text": pa.array(["three"]).dictionary_encode()}), folder / "c.parquet")
    (folder / "d.txt").write_text("four\n")
    options = DataOptions(data=(str(folder),), global_batch=5, group=3)
    planned = plan(options, Folder(str(tmp_path / "out")), LOCAL)
    rows = steps(planned)[0].to_pylist()

    assert sorted(row["query"] for row in rows) == sorted(["one", listed, "two", "three", "four"])
    assert all(row["passages"] == [row["query"]] and row["passage_keys"] == [row["query_key"]] for row in rows)
    assert {(row["dataset"], row["teacher"]) for row in rows} == {("texts", None)}
    assert planned.counts.bad == {}


def test_a_text_that_recurs_waits_for_another_batch(make):
    """No batch has a text twice, unless the rows say that others' passages are no negatives; and datasets stay apart."""
    rows = [{"text": f"Text {i // 2}", "dataset": "x"} for i in range(32)]
    loose = [{"text": "same", "dataset": "y", "in_batch_negatives": False}] * 8
    planned = make({"a": rows + loose})
    of = [{(row["dataset"], row["query"]) for row in batch.to_pylist()} for batch in steps(planned)]

    assert sorted(map(len, of)) == [1, *[8] * (len(of) - 1)]
    assert {name: (each.rows, each.batches) for name, each in planned.counts.datasets.items()} == {
        "x": (32, len(of) - 1),
        "y": (8, 1),
    }


def test_texts_and_pairs_make_one_plan(make):
    """Two --data of different kinds; the group is of the pairs."""
    planned = make({"texts": [{"text": f"t{i}"} for i in range(8)], "pairs": pairs(8)}, group=4)

    assert {batch["dataset"][0].as_py(): len(batch["passages"][0]) for batch in steps(planned)} == {
        "texts": 1,
        "pairs": 4,
    }


def test_empty_texts_are_bad_rows(make):
    """A row without text, or with an empty one, keeps its reason and takes no part."""
    texts = [None, "", " \n", *(f"text {i}" for i in range(8))]
    planned = make({"a": [*({"text": text} for text in texts), {"other": 1}, [1]]})

    assert {name: (bad.count, bad.first) for name, bad in planned.counts.bad.items()} == {
        "empty text": (2, "a.jsonl#15"),
        "no text": (2, planned.counts.bad["no text"].first),
        "not a JSON object but list": (1, planned.counts.bad["not a JSON object but list"].first),
    }
    assert planned.counts.usable == 8
    assert planned.steps == 1


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_texts_and_pairs_in_one_entry_are_refused(tmp_path, ending):
    """One file of each kind is named, before anything is read."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, row in {"a": pairs(1)[0], "b": {"text": "x"}, "c": {"text": "x"}}.items():
        if ending == "jsonl":
            write(folder / f"{name}.jsonl", [row])
        else:
            pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
    wanted = rf"b\.{ending} has single texts and .*a\.{ending} pairs\. .*'text' without them is for pretraining"
    with pytest.raises(InputError, match=wanted):
        plan(DataOptions(data=(str(folder),), global_batch=1, group=1), Folder(str(tmp_path / "out")), LOCAL)


def test_a_dataset_column_tells_datasets_apart(make):
    """Every batch is of one of them, each is whole in one bucket, and one too small for a batch is named, not fatal."""
    rows = pairs(20, dataset="nli") + pairs(17, 100, dataset="qa") + pairs(3, 200, dataset="tiny") + pairs(8, 300)
    counts = make({"mix": rows}, weight=("nli=2",)).counts

    assert {name: (each.rows, each.batches) for name, each in counts.datasets.items()} == {
        "mix": (8, 1),
        "nli": (20, 2),
        "qa": (17, 2),
        "tiny": (3, 0),
    }
    assert counts.notes == ("dataset tiny gives no batch: it has 3 usable rows, and a global batch takes 8",)


@pytest.mark.parametrize(("weight", "epochs", "each"), [("2", 2, 8), ("0.5", 3, 2), ("1.5", 2, 6), ("0.25", 1, 1)])
def test_a_weight_is_how_often_an_epoch_goes_through_a_dataset(make, weight, epochs, each):
    """An epoch has weight times a pass's batches, and goes on where the last one ended: all rows come equally often."""
    planned = make({"a": pairs(32), "b": pairs(16, 100)}, weight=(f"a={weight}",), epochs=epochs)
    order = pq.read_table(os.path.join(planned.url, "order.parquet"))["dataset"].to_pylist()
    length = each + 2

    assert planned.steps == epochs * length
    for epoch in range(epochs):
        assert Counter(order[epoch * length : (epoch + 1) * length]) == {"a": each, "b": 2}
    times = Counter(row["source"] for batch in steps(planned) for row in batch.to_pylist() if row["dataset"] == "a")
    assert max(times.values()) - (min(times.values()) if len(times) == 32 else 0) <= 1


def test_the_order_is_cut_to_the_most_steps(make):
    """--max-steps ends the plan."""
    assert make({"a": pairs(50)}, max_steps=4, epochs=3).steps == 4


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({"max_steps": 2}, 1),
        ({"max_steps": 4}, 2),  # an epoch would be 4 steps if every row found a batch, and is 3
        ({"max_steps": 9}, 3),
        ({"max_steps": 1000}, 5),
        ({"max_steps": 5, "weight": ("a=0.5",)}, 2),
        ({"max_steps": 3, "weight": ("a=2",)}, 2),
    ],
)
def test_only_passes_that_the_steps_need_are_made(make, small_buckets, options, made):
    """With --max-steps, epochs after the last step are not made; the steps are those of the plan that is not cut."""
    rows = {"a": pairs(33)}
    cut, uncut = make(rows, epochs=5, **options), make(rows, "uncut", epochs=5, **options | {"max_steps": None})
    names = [name for name in files(cut) if name.startswith("batches")]
    passes = [json.loads(pq.read_metadata(os.path.join(cut.url, name)).metadata[FACTS])["pass"] for name in names]

    assert set(passes) == set(range(made))
    assert cut.steps == min(options["max_steps"], uncut.steps)
    assert steps(cut) == steps(uncut)[: cut.steps]
    assert cut.counts == uncut.counts


def test_passes_are_made_until_the_steps_are_enough(make):
    """Where rows in each other's way fill fewer batches than there would be, more passes follow; the command resumes all."""
    rows = {"a": [{"query": f"q{i}", "pos": f"p{i // 3 if i < 24 else i}"} for i in range(40)]}
    options = {"epochs": 9, "group": 1, "max_steps": 10}
    cut, uncut = make(rows, **options), make(rows, "uncut", **options | {"max_steps": None})
    folders = sorted(name for name in os.listdir(cut.url) if name.startswith("batches"))
    before = files(cut)
    os.remove(os.path.join(cut.url, max(before)))
    os.remove(os.path.join(cut.url, next(name for name in before if name.startswith(folders[-1]))))

    assert folders[0] == "batches-0"
    assert len(folders) > 1
    assert cut.steps == 10 < uncut.steps
    assert steps(make(rows, **options)) == steps(uncut)[:10]
    assert files(cut) == before


def test_an_epoch_is_whole_before_the_next_begins():
    """Every batch of a pass comes once in its epoch, in another order each time."""
    stream = Stream("a", "a", True, 1.0)
    for number in range(2):
        stream.add(number, number, range(40))
    order = make_order([stream], ["x", "y"], 2, 0, None)
    groups = order["group"].to_pylist()

    assert order["part"].to_pylist() == ["x"] * 40 + ["y"] * 40
    assert sorted(groups[:40]) == sorted(groups[40:]) == list(range(40))
    assert groups[:40] != groups[40:]


def test_a_plan_with_lost_parts_is_mended_to_the_same_bytes(make, small_buckets):
    """After a part of either map or the order is gone, the same command makes exactly it again."""
    planned = make({"a": pairs(100)})
    before = files(planned)
    lost = [min(name for name in before if name.startswith(folder)) for folder in ("pairs-a", "batches", "order")]
    for name in lost:
        os.remove(os.path.join(planned.url, name))
    again = make({"a": pairs(100)})

    assert files(again) == before
    assert again == planned


def test_a_bucket_that_fills_no_batch_has_an_empty_part(tmp_path):
    """A part without a row group is published and read like any other."""
    texts = pa.table({"query": ["q0", "q1", "q2"], "pos": ["p0", "p1", " "]})
    sources = {"_source": [f"f#{i}" for i in range(3)], "_error": pa.nulls(3, pa.string())}
    rows = checked(pa.table({**{name: texts[name] for name in texts.column_names}, **sources}), "a")
    path = tmp_path / "part.parquet"
    pq.write_table(rows, path)
    mapper = BatchesMapper(0, 8, 2, frozenset(), {"a": EntryShards(0, 1, 0)}, PAIRS, {})
    shard = Shard(0, (FileRange(str(path), path.name, 0, 3, 3, path.stat().st_size, "", None, "a"),))
    result = mapper.load()(shard)
    folder = Folder(str(tmp_path / "batches"))
    folder.publish(RUN, b"{}")
    part = publish_part(folder, "part-0.parquet", 0, result.table, {"rows": 0}, result.facts, result.groups)
    sets = [{"dataset": "a", "in_batch": True, "batches": 0, "left_over": 2, "left_out": 0, "first": None}]

    assert isinstance(part, Part)
    assert part.rows == 0
    assert read_facts(folder, [part]) == [{"entry": "a", "bucket": 0, "pass": 0, "sets": sets, "groups": []}]


def test_threads_may_read_the_order_and_few_parts_stay_open(make, small_buckets):
    """Steps read by two threads at a time are those read alone, whatever part they lie in."""
    from concurrent.futures import ThreadPoolExecutor

    planned = make({"a": pairs(400)})
    alone, order = steps(planned), BatchReader(planned.url)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(order.read, range(order.steps)))

    assert all(one.equals(other) for one, other in zip(found, alone, strict=True))
    assert len(order._open) == 8
    with pytest.raises(IndexError, match=f"step {order.steps} of a plan of {order.steps}"):
        order.read(order.steps)
    order.close()


def test_an_unfinished_plan_cannot_be_read(tmp_path):
    """A folder without an order says what to do."""
    with pytest.raises(RunError, match=r"not finished\. Start its command again"):
        BatchReader(str(tmp_path))


@pytest.mark.parametrize("change", [{"seed": 1}, {"group": 3}, {"epochs": 2}, {"weight": ("a=2",)}, {"max_steps": 1}])
def test_another_plan_in_the_same_place_is_refused(make, change):
    """Options that change the plan are named, with both values."""
    make({"a": pairs(30)})
    with pytest.raises(RunError, match="holds another run"):
        make({"a": pairs(30)}, **change)


def test_a_command_may_be_mended_in_the_same_place(make):
    """What the first map finds out, as too few rows for a batch, does not bind the folder to the wrong command."""
    with pytest.raises(InputError, match="Lower --batch to 5"):
        make({"a": pairs(5)})
    assert make({"a": pairs(5)}, global_batch=5).steps == 1


def test_changed_data_in_the_same_place_is_refused(make, tmp_path):
    """A file that is no longer what was planned, and one that is new, are told by the entry's name."""
    make({"a": pairs(30)})
    write(tmp_path / "a.jsonl", pairs(31))
    with pytest.raises(RunError, match=r"holds another run .*files of a"):
        make({"a": pairs(31)})
    with pytest.raises(RunError, match=r"holds another run .*data"):
        make({"a": pairs(31), "b": pairs(30)})


ERRORS = {
    "only empty texts at the head": (
        [{"query": "q", "pos": " "}] * 30,
        "none of the first 30 rows .*a.jsonl#0: only empty",
    ),
    "no positive at all": ([{"query": "q", "pos": None}] * 3, "a.jsonl#0: no positive"),
    "no column pos": ([{"query": "q", "positive": "p"}], "no column 'pos' in .*Columns there: query, positive"),
    "no column query": ([{"anchor": "q", "pos": "p"}], "no column 'query' in .*Columns there: anchor, pos"),
    "neither pairs nor texts": ([{"anchor": "q"}], "no column 'query' in .*'text' without them is for pretraining"),
    "only empty texts, alone": ([{"text": ""}] * 3, "none of the first 3 rows .*a.jsonl#0: empty text"),
    "fewer rows than a batch": (
        pairs(5),
        "a gives no batch: a global batch is 8 rows .*it has 5 usable.*Lower --batch to 5",
    ),
    "small datasets": (
        [*pairs(5, dataset="x"), *pairs(6, 10, dataset="y")],
        "the largest of its 2 datasets has 6 usable rows",
    ),
    "texts in each other's way": (
        [{"query": "q", "pos": f"p{i}"} for i in range(20)],
        "a gives no batch: of its 20 usable rows",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_data_that_cannot_be_trained_on_is_told(make, name):
    """What is wrong with an entry is said with file, row and numbers."""
    rows, wanted = ERRORS[name]
    with pytest.raises(InputError, match=wanted):
        make({"a": rows})


def test_an_entry_without_a_usable_row_says_the_commonest_reasons(make, monkeypatch):
    """The reasons with counts and the first source of each, also where the first rows looked well."""
    monkeypatch.setattr("lib.training.data.sources._look", lambda entry, storage: None)
    rows = [{"query": "", "pos": "p"}] * 5 + [{"query": "q", "pos": []}] * 2
    with pytest.raises(
        InputError, match=r"none of its 7 rows .*5 rows: empty query \(first a.jsonl#0\); 2 rows: no posit"
    ):
        make({"a": rows})


def test_a_file_that_begins_with_some_bad_rows_is_no_error(make):
    """Only a head in which every row is bad stops the command."""
    assert make({"a": [*[{"query": "", "pos": ""}] * 20, *pairs(8)]}).steps == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"data": ()}, "no --data"),
        ({"data": ("x/a.jsonl", "y/a.parquet")}, "two --data are named 'a': x/a.jsonl and y/a.parquet"),
        ({"data": ("b d=x",)}, "'b d' is no name"),
        ({"data": ("a=",)}, "has no URL"),
        ({"data": ("x",), "weight": ("x",)}, "--weight 'x' is not NAME=NUMBER"),
        ({"data": ("x",), "weight": ("x=0",)}, "a number above 0"),
        ({"data": ("x",), "weight": ("x=inf",)}, "a number above 0"),
        ({"data": ("x",), "weight": ("x=1", "x=2")}, "names 'x' twice"),
        ({"data": ("x",), "global_batch": 0}, "--global-batch 0 is out of range: give 1 to 65,536"),
        ({"data": ("x",), "group": 0}, "--group 0 is out of range: give 1 or more"),
        ({"data": ("x",), "max_steps": 0}, "--max-steps 0 is out of range"),
    ],
)
def test_a_wrong_command_is_told_at_once(tmp_path, options, wanted):
    """Before any file is looked at."""
    with pytest.raises(UsageError, match=wanted):
        plan(DataOptions(**({"global_batch": 8, "group": 2} | options)), Folder(str(tmp_path)), LOCAL)


def test_a_weight_of_nothing_is_told(make, tmp_path):
    """A name that is no entry is told at once; with a dataset column, once the datasets are known, with those there are."""
    with pytest.raises(UsageError, match=r"names 'nli', which is no --data.* Choose from: a"):
        make({"a": pairs(30)}, weight=("nli=2",))
    with pytest.raises(UsageError, match="Choose from: b, qa"):
        make({"b": pairs(30, dataset="qa")}, weight=("nli=2",))
    with pytest.raises(InputError, match="nothing at"):
        plan(DataOptions(data=(str(tmp_path / "no"),), global_batch=8, group=1), Folder(str(tmp_path / "o")), LOCAL)


def test_entries_are_named_by_their_files():
    """NAME=URL, or the last name of the URL that is no pattern, without its endings."""
    words = ["s3://b/nli.jsonl.gz", "data/quora/*.parquet", "mine=data/x.jsonl", "data/year=2020/z.jsonl", "dir/"]

    assert list(parse_data(words)) == ["nli", "quora", "mine", "z", "dir"]
    assert parse_weights(["a=0.5", "b=2"]) == {"a": 0.5, "b": 2.0}


def test_buckets_are_of_64_batches_within_bounds():
    """Enough batches a bucket that few rows are left over, and never more than a worker's memory takes."""

    class Corpus:
        rows, row_bytes = 1_000_000, 100.0

    entry = Entry("a", None, Corpus(), PAIRS, {})
    assert [entry.buckets(size) for size in (8, 1024, 65_536)] == [40, 16, 4]
    entry.corpus.row_bytes = 100_000.0
    assert [entry.buckets(size) for size in (8, 1024)] == [373, 245]

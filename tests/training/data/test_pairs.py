"""The first map: checked pairs, single texts, bad rows and their reasons."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.engine.shuffle import REASON
from lib.storage.folder import Folder
from lib.training.data.job import DataOptions, plan
from lib.training.data.pairs import text_keys
from tests.support.training_plans import LOCAL, pairs, partitioned, steps, write


def test_texts_are_the_same_that_differ_in_case_space_or_width():
    """Keys are of normalised texts, and the same in every process."""
    keys = text_keys(pa.array(["Ａ  b", "a B ", "a\n b", "ab", None, ""], pa.large_string()))

    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert keys[4] == keys[5]
    assert text_keys(pa.array(["training pairs"], pa.large_string())).tolist() == [26582360159699040]


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


def test_bad_rows_keep_their_reason_and_take_no_part(make_plan):
    """Each row that cannot be used stands in a partitioned part with its reason, and in no batch."""
    planned = make_plan({"a": [*pairs(8), *(row for row, _ in BAD), [1]]})
    table = partitioned(planned, "a")
    reasons = [reason for reason in table[REASON].to_pylist() if reason]

    assert table.num_rows == 8 + len(BAD) + 1
    for _, wanted in BAD:
        assert any(reason.startswith(wanted) for reason in reasons), wanted
    assert "not a JSON object but list" in reasons
    assert planned.counts.rows - planned.counts.usable == len(BAD) + 1
    assert {row for batch in steps(planned) for row in batch["query"].to_pylist()} == {f"query {i}" for i in range(8)}


@pytest.mark.parametrize("nothing", [None, [], [None], "absent"])
def test_negatives_may_be_null_in_some_rows(make_plan, nothing):
    """A JSONL row with null negatives is a pair without any: left out with others that have some, no row that is bad."""
    rows = pairs(24)
    for row in rows[::3]:
        row["neg"] = nothing
        if nothing == "absent":
            del row["neg"]
    planned, alone = make_plan({"a": rows}), make_plan({"a": rows}, "alone", group=1)

    assert (planned.counts.usable, planned.steps) == (16, 2)
    assert {name: bad.count for name, bad in planned.counts.bad.items()} == {"no negatives": 8}
    assert (alone.counts.usable, alone.steps, alone.counts.bad) == (24, 3, {})


def test_texts_alone_are_rows_of_one_text(tmp_path):
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


def test_empty_texts_are_bad_rows(make_plan):
    """A row without text, or with an empty one, keeps its reason and takes no part."""
    texts = [None, "", " \n", *(f"text {i}" for i in range(8))]
    planned = make_plan({"a": [*({"text": text} for text in texts), {"other": 1}, [1]]})

    assert {name: (bad.count, bad.first) for name, bad in planned.counts.bad.items()} == {
        "empty text": (2, "a.jsonl#15"),
        "no text": (2, planned.counts.bad["no text"].first),
        "not a JSON object but list": (1, planned.counts.bad["not a JSON object but list"].first),
    }
    assert planned.counts.usable == 8
    assert planned.steps == 1

"""The files of a plan: their names, their columns, their first rows."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import InputError
from lib.storage.folder import Folder
from lib.training.data.job import DataOptions, plan
from lib.training.data.pairs import PAIRS
from lib.training.data.sources import Entry, parse_data, parse_weights
from tests.support.training_plans import LOCAL, pairs, steps, write


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


@pytest.mark.parametrize("forms", [(["p0"], "p1"), ("p0", ["p1"])])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_positives_may_be_lists_in_one_file_and_texts_in_another(tmp_path, forms, ending):
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


def test_a_file_that_begins_with_some_bad_rows_is_no_error(make_plan):
    """Only a head in which every row is bad stops the command."""
    assert make_plan({"a": [*[{"query": "", "pos": ""}] * 20, *pairs(8)]}).steps == 1


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
}


@pytest.mark.parametrize("name", ERRORS)
def test_files_that_have_no_pairs_are_refused(make_plan, name):
    """Files without the columns, or with bad rows alone, are named with their first row or their columns."""
    rows, wanted = ERRORS[name]
    with pytest.raises(InputError, match=wanted):
        make_plan({"a": rows})

"""Columns of texts and of scores, as single values or as lists, in every format."""

import pyarrow as pa
import pyarrow.parquet as pq

from lib.engine.shuffle import REASON
from lib.storage.folder import Folder
from lib.training.data.job import DataOptions, plan
from lib.training.data.pairs import as_pairs
from tests.support.training_plans import LOCAL, steps, write


def test_texts_and_lists_of_texts_are_the_same_in_every_format(tmp_path):
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
        assert as_pairs(table, "f")[REASON].to_pylist() == [f"pos is {table['pos'].type}"]

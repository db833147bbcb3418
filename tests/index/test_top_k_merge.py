"""The merge of ranked lists: the best rows of each query, equal to one sort of all lists."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.shards import FileRange, Shard
from lib.index.exact.top_k_merge import RankedLists, TopKMerge

RANKED = RankedLists(query=("value", "query"), item="number", k=3)


def lists(seed: int, rows: int = 60) -> pa.Table:
    """Rows of 2 x 4 queries, with few different scores; no number twice."""
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "value": random.integers(0, 2, rows).astype(np.int32),
            "query": random.integers(0, 4, rows).astype(np.int32),
            "number": random.permutation(rows) + rows * seed,
            "score": (random.integers(0, 5, rows) / 4).astype(np.float32),
        }
    )


def test_merged_lists_are_those_of_one_sort():
    """Of several lists the best rows of each query are those of all lists sorted by score; of equal scores the first numbers."""
    tables = [lists(seed) for seed in range(5)]
    rows = pa.concat_tables(tables).to_pylist()
    wanted = []
    for key in sorted({(row["value"], row["query"]) for row in rows}):
        own = [row for row in rows if (row["value"], row["query"]) == key]
        wanted += sorted(own, key=lambda row: (-row["score"], row["number"]))[:3]
    merged = RANKED.merge(iter(tables)).to_pylist()

    assert sorted(merged, key=lambda row: (row["value"], row["query"])) == wanted


def test_of_equal_scores_the_last_id_is_first():
    """Ids are ranked as trec_eval does; an id that is in several lists counts once, with its greatest score."""
    ranked = RankedLists(query=("query",), item="passage", k=2)
    one = pa.table({"query": ["q", "q"], "passage": ["a", "b"], "score": pa.array([0.5, 0.5], pa.float32())})
    other = pa.table({"query": ["q", "q"], "passage": ["a", "c"], "score": pa.array([0.25, 0.5], pa.float32())})

    assert ranked.merge(iter([one, other]))["passage"].to_pylist() == ["c", "b"]


def test_a_query_without_any_item_keeps_one_row(tmp_path):
    """A row without a score says why its query has nothing: it stays once, and only where no list has an item of the query."""
    ranked = RankedLists(query=("query",), item="passage", k=2, reasons=("error",))
    scores = pa.array([0.5, None], pa.float32())
    one = pa.table({"query": ["q", "r"], "passage": ["a", None], "score": scores, "error": [None, "no vector"]})
    other = pa.table(
        {
            "query": ["q", "r"],
            "passage": pa.nulls(2, pa.string()),
            "score": pa.nulls(2, pa.float32()),
            "error": ["nothing", "no vector"],
        }
    )
    for name, table in {"0": one, "1": other}.items():
        pq.write_table(table, tmp_path / name)
    ranges = [FileRange(str(tmp_path / name), name, 0, 2, 2, 0, "", None) for name in "01"]
    result = TopKMerge(ranked, {}).load()(Shard(0, tuple(ranges)))

    assert result.table.to_pylist() == [
        {"query": "q", "passage": "a", "score": 0.5, "error": None},
        {"query": "r", "passage": None, "score": None, "error": "no vector"},
    ]
    assert result.counts == {"errors": 1}


def test_empty_lists_merge_to_an_empty_one():
    """A part without any row is no error."""
    empty = lists(0)[:0]

    assert RANKED.merge(iter([empty, empty])).num_rows == 0
    assert RANKED.merge(iter([empty, lists(1)])).num_rows > 0

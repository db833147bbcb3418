"""jobs/search_index.py: each query's best passages by an index of any kind, with one segment or several, filters, and queries of
any form."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.engine.report import report
from lib.errors import InputError, RunError, UsageError
from lib.index.kinds import names
from lib.index.search import job, segment_reader
from lib.index.search.job import block_rows, search
from tests.support.indexed import DIM, built, clustered, cut_small, exact, write, write_many
from tests.support.messages import listen
from tests.support.searched import config_of, hits_of, lists_of, read_hits

ROWS, LISTS = 3000, 16
EXACT = {"flat": {}, "hnsw": {"ef_search": 512}}  # options for nearly exact search; of other kinds nprobe=64


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(ROWS)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(70, seed=4)


@pytest.fixture
def source(tmp_path, vectors):
    return write_many(tmp_path / "vectors", vectors)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory, vectors):
    """built_once(kind, many, **options): the folder of an index of the vectors, made at the first call. many: of several segments."""
    folder = tmp_path_factory.mktemp("indexes")
    source = write_many(folder / "vectors", vectors)

    @cache
    def make(kind: str, many: bool, **options: float) -> Path:
        output = folder / f"{kind}-{many}-{options}"
        with pytest.MonkeyPatch.context() as patch:
            if many:
                cut_small(patch, 4 * DIM * 700)
            built(source, output, kind=kind, shard_rows=300, **options)
        return output

    return make


@pytest.fixture
def use_index(built_once, tmp_path):
    """use_index(kind, many, **options): the card of an index at `tmp_path`/index, which the test only reads."""

    def use(kind: str = "flat", many: bool = False, **options: float) -> dict[str, Any]:
        (tmp_path / "index").symlink_to(built_once(kind, many, **options))
        return json.loads((tmp_path / "index" / "card.json").read_text())

    return use


@pytest.fixture
def query_files(tmp_path, queries):
    """A folder with the queries' vectors, without the second one."""
    write(tmp_path / "queries" / "0.parquet", queries, absent=(1,))
    return tmp_path / "queries"


@pytest.mark.parametrize("many", [False, True])
def test_flat_returns_the_hits_of_numpy(use_index, tmp_path, query_files, vectors, queries, many):
    """Ids, order and scores equal those of a matrix product, for one segment and for several."""
    card = use_index("flat", many)
    table = hits_of(tmp_path, query_files, top_k=20)
    best = exact(queries, vectors, 20)
    scores = table.filter(pa.compute.equal(table["query_id"], "d0"))["score"].to_numpy()

    assert (card["segments"] > 1) is many
    assert lists_of(table) == {f"d{q}": [f"d{n}" for n in best[q]] for q in range(len(queries)) if q != 1}
    np.testing.assert_allclose(scores, queries[0] @ vectors[best[0]].T, rtol=1e-5)


def test_a_query_without_a_vector_is_kept_with_its_reason(use_index, tmp_path, query_files):
    """It is one row without a passage, for any number of segments."""
    use_index("ivf-flat", True, lists=LISTS)
    table = hits_of(tmp_path, query_files, top_k=5)
    rows = [row for row in table.to_pylist() if row["query_id"] == "d1"]

    assert rows == [{"query_id": "d1", "passage_id": None, "score": None, "error": "empty text"}]


@pytest.mark.parametrize(("kind", "many"), [*((name, False) for name in names()), ("ivf-rabitq", True), ("flat", True)])
def test_only_allowed_passages_are_returned(use_index, tmp_path, query_files, vectors, queries, kind, many):
    """With --allow every kind returns only those ids, and still fills the lists."""
    use_index(kind, many)
    allowed = list(range(0, ROWS, 7))
    (tmp_path / "allow.jsonl").write_text("".join(json.dumps({"id": f"d{n}"}) + "\n" for n in [*allowed, 999_999]))
    table = hits_of(
        tmp_path, query_files, top_k=10, allow=str(tmp_path / "allow.jsonl"), **EXACT.get(kind, {"nprobe": 64})
    )
    lists = lists_of(table)
    best = exact(queries, vectors[allowed], 10)
    hits = [len({f"d{allowed[n]}" for n in best[q]} & set(lists[f"d{q}"])) for q in range(len(queries)) if q != 1]

    assert {name for each in lists.values() for name in each} <= {f"d{n}" for n in allowed}
    assert np.mean([len(each) for each in lists.values()]) > 9
    assert np.mean(hits) / 10 > (0.3 if "pq" in kind else 0.8)


def test_allowed_ids_that_the_index_has_are_counted(tmp_path, query_files, vectors, monkeypatch):
    """The message and the report count the allowed ids that the index has, each once, for any number of rows and segments."""
    cut_small(monkeypatch, 4 * DIM * 700)
    monkeypatch.setattr("lib.index.search.filter.IDS_AT_ONCE", 500)
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors))
    ids = pa.array([f"p{row % 60}" for row in range(ROWS)], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat", shard_rows=300)
    pq.write_table(pa.table({"id": ["p3", "p59", "p60", "d1", "p3", None]}), tmp_path / "allow.parquet")
    messages = listen()
    config = config_of(tmp_path, query_files, allow=str(tmp_path / "allow.parquet"))
    outcome = search(config)

    assert "2 of the 4 ids of --allow are in the index" in messages
    assert "2 of the 4 ids of --allow are in the index" in report(outcome, "hits")
    monkeypatch.setattr("lib.index.search.filter.COUNTED_ROWS", 100)
    search(config)
    assert "4 ids of --allow; how many of them are in an index of 3,000 rows is not counted" in messages


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_other_metrics(tmp_path, vectors, queries, metric):
    """--metric ip ranks by products of vectors as they are, l2 by squared distances; scores are their negatives."""
    longer = vectors * np.random.default_rng(5).uniform(0.5, 2, len(vectors)).astype(np.float32)[:, None]
    write(tmp_path / "vectors" / "0.parquet", longer, normalized=False)
    write(tmp_path / "queries" / "0.parquet", queries, normalized=False)
    built(tmp_path / "vectors", tmp_path / "index", kind="flat", metric=metric)
    table = hits_of(tmp_path, tmp_path / "queries", top_k=5)
    scores = queries @ longer.T
    if metric == "l2":
        scores = -np.square(queries[:, None] - longer[None]).sum(axis=2)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    first = table.filter(pa.compute.equal(table["query_id"], "d3"))["score"].to_numpy()

    assert lists_of(table) == {f"d{q}": [f"d{n}" for n in best[q]] for q in range(len(queries))}
    np.testing.assert_allclose(first, scores[3, best[3]], rtol=1e-4)


def test_queries_of_bytes(use_index, tmp_path, queries, vectors):
    """int8 queries are read with the ranges in their own files; an index of floats returns nearly the same hits."""
    low, high = queries.min(axis=0) * 1.1, queries.max(axis=0) * 1.1
    coded = np.round((queries - low) / (high - low) * 255 - 128.5).clip(-128, 127).astype(np.int8)
    write(tmp_path / "queries" / "0.parquet", coded, output_dtype="int8", int8_ranges=[low.tolist(), high.tolist()])
    use_index("flat")
    lists, best = lists_of(hits_of(tmp_path, tmp_path / "queries", top_k=10)), exact(queries, vectors, 10)
    hits = [len({f"d{n}" for n in best[q]} & set(lists[f"d{q}"])) / 10 for q in range(len(queries))]

    assert np.mean(hits) > 0.9


def test_nprobe_raises_recall(use_index, tmp_path, query_files, vectors, queries):
    """A higher --nprobe scans more lists and returns more of the nearest; the default is the card's advice."""
    card = use_index("ivf-flat", lists=LISTS, recall=0.95)
    best = exact(queries, vectors, 10)

    def recall(name: str, nprobe: int | None) -> float:
        lists = lists_of(hits_of(tmp_path, query_files, name, top_k=10, nprobe=nprobe))
        return np.mean(
            [len({f"d{n}" for n in best[q]} & set(lists[f"d{q}"])) / 10 for q in range(len(queries)) if q != 1]
        )

    assert recall("one", 1) < recall("all", LISTS) == 1.0
    assert recall("advised", None) == pytest.approx(recall("same", card["advised_value"]))


@pytest.mark.parametrize("many", [False, True])
def test_chunks_of_a_passage_count_once(tmp_path, query_files, vectors, queries, monkeypatch, many):
    """Where several rows have one id, a query's list has it once, with the best score, and has top_k passages; for one segment and
    for several."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors))
    owners = np.arange(ROWS) % 60  # fifty rows each
    ids = pa.array([f"p{owner}" for owner in owners], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat", shard_rows=300)
    lists = lists_of(hits_of(tmp_path, query_files, top_k=30))
    order = exact(queries, vectors, ROWS)
    expected = {f"d{q}": [f"p{n}" for n in dict.fromkeys(owners[order[q]].tolist())][:30] for q in range(len(queries))}

    assert lists == {name: each for name, each in expected.items() if name != "d1"}


def test_only_queries_that_lack_passages_are_searched_again(tmp_path, vectors, monkeypatch):
    """For a query near a passage of very many chunks more rows are searched, and not for the other queries of its block."""
    near = np.repeat(vectors[:1], 600, axis=0)
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", np.concatenate([vectors, near])))
    ids = pa.array([*(f"d{row}" for row in range(ROWS)), *["long"] * len(near)], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat")
    queries = np.concatenate([vectors[:1], clustered(69, seed=4)])
    write(tmp_path / "queries" / "0.parquet", queries)
    searches: list[tuple[int, int]] = []
    open_segment = segment_reader.open_segment

    class WatchedIndex:
        def __init__(self, path: str):
            self.index = open_segment(path)
            self.ntotal = self.index.ntotal

        def search(self, vectors, k, **more):
            searches.append((len(vectors), k))
            return self.index.search(vectors, k, **more)

    monkeypatch.setattr(segment_reader, "open_segment", WatchedIndex)
    lists = lists_of(hits_of(tmp_path, tmp_path / "queries", top_k=10))
    order = exact(queries, np.concatenate([vectors, near]), ROWS + 600)
    expected = {f"d{q}": list(dict.fromkeys(ids.to_numpy(zero_copy_only=False)[order[q]]))[:10] for q in range(1, 70)}

    assert searches[0] == (70, 10)
    assert max(k for _, k in searches) > 600
    assert sum(count for count, _ in searches[1:]) < 10
    assert {name: each for name, each in lists.items() if name != "d0"} == expected
    assert len(set(lists["d0"])) == 10
    assert "long" in lists["d0"]


@pytest.mark.parametrize(("k", "queries"), [(10, 32_768), (100, 20_971), (1000, 2097), (10_000_000, 1)])
def test_a_block_of_queries_has_lists_that_a_worker_can_hold(k, queries):
    """The greater top_k, the fewer queries a shard has; one at least."""
    assert block_rows(10_000_000, k) == queries


@pytest.mark.parametrize("many", [False, True])
def test_lists_are_the_same_in_blocks_of_any_size(use_index, tmp_path, query_files, monkeypatch, many):
    """Blocks of few queries, and searches of few queries at once, give the same lists."""
    use_index("ivf-flat", many, lists=LISTS)
    whole = hits_of(tmp_path, query_files, "whole", top_k=20)
    monkeypatch.setattr("lib.index.search.job.HITS_AT_ONCE", 200)
    monkeypatch.setattr("lib.index.search.mappers.HITS_AT_ONCE", 60)
    table = hits_of(tmp_path, query_files, "by-tens", top_k=20)

    assert len(list((tmp_path / "by-tens").glob("part-*"))) == 7
    assert lists_of(table) == lists_of(whole)
    assert table.num_rows == whole.num_rows


def test_a_query_without_a_hit_is_kept(use_index, tmp_path, query_files):
    """A query with no allowed passage in the probed lists is one row with that reason, for several segments too."""
    use_index("ivf-flat", True, lists=LISTS)
    (tmp_path / "allow.jsonl").write_text('{"id": "d7"}\n')
    table = hits_of(tmp_path, query_files, nprobe=1, allow=str(tmp_path / "allow.jsonl")).to_pylist()

    assert sorted(row["query_id"] for row in table) == sorted(f"d{q}" for q in range(70))
    assert {row["passage_id"] for row in table} == {None, "d7"}
    for row in table:
        if row["query_id"] == "d1":
            assert row["error"] == "empty text"
        else:
            assert (row["error"] or "").startswith("nothing was found") == (row["passage_id"] is None)


def test_rows_without_an_id_are_named_by_their_place(tmp_path, query_files, vectors, queries):
    """A row with a null in the id column is named FILE#POSITION."""
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors))
    ids = pa.array([None if row % 2 else f"d{row}" for row in range(ROWS)], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat")
    lists = lists_of(hits_of(tmp_path, query_files, top_k=3))
    best = exact(queries, vectors, 3)

    assert lists["d0"] == [f"0.parquet#{n}" if n % 2 else f"d{n}" for n in best[0]]


@pytest.mark.parametrize("many", [False, True])
def test_queries_without_an_id_are_named_by_their_place(use_index, tmp_path, queries, many):
    """Queries without an id column, or with a null in it, are named FILE#POSITION, with the path of FILE below the input."""
    table = pq.read_table(write(tmp_path / "queries" / "a" / "0.parquet", queries[:4]))
    pq.write_table(table.drop_columns(["id"]), tmp_path / "queries" / "a" / "0.parquet")
    named = pq.read_table(write(tmp_path / "named" / "0.parquet", queries[:4], absent=(2,)))
    ids = pa.array(["first", None, None, "last"], pa.large_string())
    pq.write_table(named.set_column(0, "id", ids), tmp_path / "named" / "0.parquet")
    use_index("flat", many)
    unnamed, some = (hits_of(tmp_path, tmp_path / name, f"hits-{name}", top_k=3) for name in ("queries", "named"))

    assert set(unnamed["query_id"].to_pylist()) == {f"a/0.parquet#{n}" for n in range(4)}
    assert set(some["query_id"].to_pylist()) == {"first", "0.parquet#1", "0.parquet#2", "last"}


def test_changed_queries_are_another_search(use_index, tmp_path, query_files, queries):
    """A search with changed or more queries in the same output is refused."""
    use_index("flat")
    hits_of(tmp_path, query_files, top_k=5)
    write(query_files / "1.parquet", queries[:3], first=100)

    with pytest.raises(RunError, match="files: there"):
        hits_of(tmp_path, query_files, top_k=5)


@pytest.mark.parametrize("finished", [True, False])
def test_a_search_of_a_grown_index_is_another(source, tmp_path, query_files, monkeypatch, finished):
    """The same command over an index with more vectors is refused. The message is short and has the old and new counts; for one
    segment and several, for finished searches and others."""
    built(source, tmp_path / "index", kind="flat", shard_rows=300)
    hits_of(tmp_path, query_files, "of-one", top_k=5)
    cut_small(monkeypatch, 4 * DIM * 700)
    counts = []
    for more in (1, 2):
        write(source / f"more-{more}.parquet", clustered(ROWS, seed=more), first=ROWS * more)
        counts.append(built(source, tmp_path / "index", kind="flat", shard_rows=300)["segments"])
        if more == 1:
            hits_of(tmp_path, query_files, "of-many", top_k=5)
    if not finished:
        for path in [tmp_path / "of-many" / "_run.json", *(tmp_path / "of-many").glob("part-*")]:
            path.unlink()

    for name, before in (
        ("of-one", r"3,000 vectors in 1 segments"),
        ("of-many", rf"6,000 vectors in {counts[0]} segments"),
    ):
        words = rf"{name} holds lists of an index of {before}, and that at .*index has 9,000 in {counts[1]} now: it has grown"
        with pytest.raises(RunError, match=words) as refused:
            hits_of(tmp_path, query_files, name, top_k=5)
        assert len(str(refused.value)) < 400
        assert not list((tmp_path / "of-one").rglob("_stages"))


def test_the_same_search_resumes(use_index, tmp_path, query_files):
    """A search that was stopped writes only the missing parts; another one in the same place is refused."""
    use_index("ivf-flat", True, lists=LISTS)
    whole = hits_of(tmp_path, query_files, top_k=5)
    parts = sorted((tmp_path / "hits" / "_stages" / "segments").glob("part-*"))
    times = {path: path.stat().st_mtime_ns for path in parts[1:]}
    parts[0].unlink()
    for path in [*(tmp_path / "hits").glob("part-*"), *(tmp_path / "hits").rglob("_manifest.parquet")]:
        path.unlink()

    assert hits_of(tmp_path, query_files, top_k=5).equals(whole)
    assert {path: path.stat().st_mtime_ns for path in parts[1:]} == times
    with pytest.raises(Exception, match="top_k: there 5, asked 6"):
        hits_of(tmp_path, query_files, top_k=6)


def test_a_search_on_ray_reports_what_it_did(source, tmp_path, queries, vectors, monkeypatch):
    """On Ray's workers the lists are the same. The report has rows and time, and where queries are vectors no tokens, padding or
    model. Queries without an id are named after their file on Ray too."""
    cut_small(monkeypatch, 4 * DIM * 1500)
    built(source, tmp_path / "index", kind="flat", max_workers=1)
    table = pq.read_table(write(tmp_path / "queries" / "0.parquet", queries, absent=(1,)))
    pq.write_table(table.drop_columns(["id"]), tmp_path / "queries" / "0.parquet")
    config = config_of(tmp_path, tmp_path / "queries", top_k=5, max_workers=1, executor="ray")
    text = report(search(config), config.output)
    lists = lists_of(read_hits(tmp_path / "hits"))
    best = exact(queries, vectors, 5)

    assert lists == {f"0.parquet#{q}": [f"d{n}" for n in best[q]] for q in range(len(queries)) if q != 1}
    assert "346 (1 kept with an error)" in text
    assert "346 rows in" in text
    assert "rows/s" in text
    assert not [word for word in ("token", "padding", "truncated", "model", "equal texts") if word in text]


# Wrong input


@pytest.mark.parametrize("lost", ["segments/segment-*", "rows/part-*", "rows/_manifest.parquet"])
def test_an_index_that_lost_a_file(source, tmp_path, query_files, monkeypatch, lost):
    """Missing or truncated segments and encoded rows are named before anything is searched; the build writes them again."""
    cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    whole = hits_of(tmp_path, query_files, "whole", top_k=5)
    first, *more = sorted((tmp_path / "index").glob(lost))
    first.unlink()
    for path in more[:1]:
        path.write_bytes(path.read_bytes()[:1000])

    words = rf"files of the index in .* are gone or not whole, {first.name} the first\. Delete .* and start the command again"
    with pytest.raises(InputError, match=words):
        hits_of(tmp_path, query_files, top_k=5)
    for path in more[:1]:
        path.unlink()
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    assert hits_of(tmp_path, query_files, top_k=5).equals(whole)


@pytest.mark.parametrize("lost", ["segments/segment-*", "rows/part-*"])
def test_an_index_file_that_a_node_lacks(source, tmp_path, query_files, monkeypatch, lost):
    """A file that the driver sees and a worker does not is named with the node and the next action, without another attempt."""
    built(source, tmp_path / "index", kind="flat", shard_rows=300)
    search_plan = job.search_plan

    def remove_and_plan(*arguments):
        next((tmp_path / "index").glob(lost)).unlink()
        return search_plan(*arguments)

    monkeypatch.setattr(job, "search_plan", remove_and_plan)
    with pytest.raises(InputError, match=r"index/(segments|rows)/.* is not there on the node .*: .* builds the index"):
        hits_of(tmp_path, query_files)


def test_an_index_that_is_not_finished(source, tmp_path, query_files):
    """A folder without a card is refused with the next action."""
    with pytest.raises(InputError, match="no finished index at"):
        hits_of(tmp_path, query_files)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"nprobe": 4}, "--nprobe 4: flat searches everything"),
        ({"ef_search": 40}, "--ef-search 40: flat searches everything"),
        ({"reranker": "x"}, "give --corpus"),
        ({"allow": "nothing"}, "nothing at nothing"),
        ({"id_column": "name"}, "no column 'name'"),
    ],
)
def test_wrong_commands_are_refused(use_index, tmp_path, query_files, more, words):
    """A wrong value is named with the next action."""
    use_index("flat")

    with pytest.raises((UsageError, InputError), match=words):
        hits_of(tmp_path, query_files, **more)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ivf-flat", {"ef_search": 40}, "--ef-search 40: a search of ivf-flat has --nprobe instead. Write --nprobe 40"),
        ("hnsw", {"nprobe": 4}, "--nprobe 4: a search of hnsw.* has --ef-search instead. Write --ef-search 4"),
    ],
)
def test_the_search_parameter_of_another_kind_is_refused(use_index, tmp_path, query_files, kind, options, message):
    """--nprobe for hnsw, or --ef-search for a kind with lists, is refused with the right option."""
    use_index(kind)

    with pytest.raises(UsageError, match=message):
        hits_of(tmp_path, query_files, **options)


@pytest.mark.parametrize("type", [pa.list_(pa.float32()), pa.list_(pa.float32(), DIM)])
def test_queries_without_a_row_are_refused(use_index, tmp_path, type):
    """A file without queries is refused with the next action, for vectors of fixed and of variable length."""
    use_index("flat")
    (tmp_path / "none").mkdir()
    columns = [("id", pa.string()), ("embedding", type)]
    pq.write_table(pa.schema(columns).empty_table(), tmp_path / "none" / "0.parquet")

    with pytest.raises(InputError, match=r"none has no rows: .* Give it queries, or correct --input"):
        hits_of(tmp_path, tmp_path / "none")


@pytest.mark.parametrize("many", [False, True])
def test_an_id_of_several_queries_is_refused(use_index, tmp_path, queries, many):
    """Repeated ids are named with their counts before anything is searched: the hits could not be told apart."""
    use_index("flat", many)
    write(tmp_path / "queries" / "0.parquet", queries)
    for name in ("1", "2"):
        write(tmp_path / "queries" / f"{name}.parquet", queries[:1], first=7)

    with pytest.raises(
        InputError, match=r"1 query ids come more than once in .*queries: 'd7' \(3 times\)\. An id must"
    ):
        hits_of(tmp_path, tmp_path / "queries")
    assert not list((tmp_path / "hits").rglob("part-*"))

"""jobs/search_index.py: each query's best passages by an index, whatever its kind, pieces, filter, and form of the queries."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.engine.report import report
from lib.errors import InputError, RunError, UsageError
from lib.index.kinds import names
from lib.index.search import mappers
from lib.index.search.job import block_rows, search
from lib.index.search.query import SearchConfig
from tests.support.indexed import DIM, built, clustered, cut_small, exact, write, write_many
from tests.support.messages import listen
from tests.support.searched import found, lists_of

ROWS, LISTS = 3000, 16
EVERYTHING = {"flat": None, "hnsw": 512}  # efforts; of the others 64 lists


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(ROWS)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(70, seed=4)


@pytest.fixture
def source(tmp_path, vectors):
    return write_many(tmp_path / "vectors", vectors)


@pytest.fixture
def asked(tmp_path, queries):
    """A folder with the queries' vectors, the second of which is missing."""
    write(tmp_path / "queries" / "0.parquet", queries, absent=(1,))
    return tmp_path / "queries"


@pytest.mark.parametrize("many", [False, True])
def test_flat_finds_what_numpy_finds(source, tmp_path, asked, vectors, queries, monkeypatch, many):
    """Ids, order and scores are those of a product of matrices, in one piece or several."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    card = built(source, tmp_path / "index", kind="flat", shard_rows=300)
    table = found(tmp_path, asked, top_k=20)
    best = exact(queries, vectors, 20)
    scores = table.filter(pa.compute.equal(table["query_id"], "d0"))["score"].to_numpy()

    assert (card["pieces"] > 1) is many
    assert lists_of(table) == {f"d{q}": [f"d{n}" for n in best[q]] for q in range(len(queries)) if q != 1}
    np.testing.assert_allclose(scores, queries[0] @ vectors[best[0]].T, rtol=1e-5)


def test_a_query_without_a_vector_is_kept_with_its_reason(source, tmp_path, asked, monkeypatch):
    """It is one row without a passage, whatever the number of pieces."""
    cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    table = found(tmp_path, asked, top_k=5)
    rows = [row for row in table.to_pylist() if row["query_id"] == "d1"]

    assert rows == [{"query_id": "d1", "passage_id": None, "score": None, "error": "empty text"}]


@pytest.mark.parametrize(("kind", "many"), [*((name, False) for name in names()), ("ivf-rabitq", True), ("flat", True)])
def test_only_allowed_passages_are_found(source, tmp_path, asked, vectors, queries, monkeypatch, kind, many):
    """--allow keeps to its ids in every kind, and still fills the lists from them."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind=kind, shard_rows=300)
    allowed = list(range(0, ROWS, 7))
    (tmp_path / "allow.jsonl").write_text("".join(json.dumps({"id": f"d{n}"}) + "\n" for n in [*allowed, 999_999]))
    table = found(tmp_path, asked, top_k=10, effort=EVERYTHING.get(kind, 64), allow=str(tmp_path / "allow.jsonl"))
    lists = lists_of(table)
    best = exact(queries, vectors[allowed], 10)
    hits = [len({f"d{allowed[n]}" for n in best[q]} & set(lists[f"d{q}"])) for q in range(len(queries)) if q != 1]

    assert {name for each in lists.values() for name in each} <= {f"d{n}" for n in allowed}
    assert np.mean([len(each) for each in lists.values()]) > 9
    assert np.mean(hits) / 10 > (0.3 if "pq" in kind else 0.8)


def test_allowed_ids_that_the_index_has_are_counted(tmp_path, asked, vectors, monkeypatch):
    """A run says, as does its report, how many of the allowed ids are in the index: each once, of however many rows and in
    whichever pieces."""
    cut_small(monkeypatch, 4 * DIM * 700)
    monkeypatch.setattr("lib.index.search.filter.IDS_AT_ONCE", 500)
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors))
    ids = pa.array([f"p{row % 60}" for row in range(ROWS)], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat", shard_rows=300)
    pq.write_table(pa.table({"id": ["p3", "p59", "p60", "d1", "p3", None]}), tmp_path / "allow.parquet")
    said = listen()
    where = {"index": str(tmp_path / "index"), "input": str(asked), "output": str(tmp_path / "found")}
    outcome = search(configure(SearchConfig, **where, allow=str(tmp_path / "allow.parquet")))

    assert "2 of the 4 ids of --allow are in the index" in said
    assert "2 of the 4 ids of --allow are in the index" in report(outcome, "found")
    monkeypatch.setattr("lib.index.search.filter.COUNTED", 100)
    search(configure(SearchConfig, **where, allow=str(tmp_path / "allow.parquet")))
    assert "4 ids of --allow; how many of them are in an index of 3,000 rows is not counted" in said


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_other_metrics(tmp_path, vectors, queries, metric):
    """--metric ip ranks by products of vectors as they are, l2 by squared distances, whose negatives are the scores."""
    longer = vectors * np.random.default_rng(5).uniform(0.5, 2, len(vectors)).astype(np.float32)[:, None]
    write(tmp_path / "vectors" / "0.parquet", longer, normalized=False)
    write(tmp_path / "queries" / "0.parquet", queries, normalized=False)
    built(tmp_path / "vectors", tmp_path / "index", kind="flat", metric=metric)
    table = found(tmp_path, tmp_path / "queries", top_k=5)
    scores = queries @ longer.T
    if metric == "l2":
        scores = -np.square(queries[:, None] - longer[None]).sum(axis=2)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    told = table.filter(pa.compute.equal(table["query_id"], "d3"))["score"].to_numpy()

    assert lists_of(table) == {f"d{q}": [f"d{n}" for n in best[q]] for q in range(len(queries))}
    np.testing.assert_allclose(told, scores[3, best[3]], rtol=1e-4)


def test_queries_of_bytes(source, tmp_path, queries, vectors):
    """int8 queries are read by the ranges that their own files tell; an index of floats finds nearly the same by them."""
    low, high = queries.min(axis=0) * 1.1, queries.max(axis=0) * 1.1
    coded = np.round((queries - low) / (high - low) * 255 - 128.5).clip(-128, 127).astype(np.int8)
    write(tmp_path / "queries" / "0.parquet", coded, output_dtype="int8", int8_ranges=[low.tolist(), high.tolist()])
    built(source, tmp_path / "index", kind="flat")
    lists, best = lists_of(found(tmp_path, tmp_path / "queries", top_k=10)), exact(queries, vectors, 10)
    hits = [len({f"d{n}" for n in best[q]} & set(lists[f"d{q}"])) / 10 for q in range(len(queries))]

    assert np.mean(hits) > 0.9


def test_effort_finds_more(source, tmp_path, asked, vectors, queries):
    """A higher --effort probes more lists; by itself the card's advice is taken."""
    card = built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, recall=0.95)
    best = exact(queries, vectors, 10)

    def hits(name: str, effort: int | None) -> float:
        lists = lists_of(found(tmp_path, asked, name, top_k=10, effort=effort))
        return np.mean(
            [len({f"d{n}" for n in best[q]} & set(lists[f"d{q}"])) / 10 for q in range(len(queries)) if q != 1]
        )

    assert hits("one", 1) < hits("all", LISTS) == 1.0
    assert hits("advised", None) == pytest.approx(hits("same", card["advised"]))


@pytest.mark.parametrize("many", [False, True])
def test_chunks_of_a_passage_count_once(tmp_path, asked, vectors, queries, monkeypatch, many):
    """Where several rows have the same id, a query's list has it once, by the best of them, and is as long as was asked for;
    in one piece and in many."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors))
    owners = np.arange(ROWS) % 60  # fifty rows each
    ids = pa.array([f"p{owner}" for owner in owners], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat", shard_rows=300)
    lists = lists_of(found(tmp_path, asked, top_k=30))
    order = exact(queries, vectors, ROWS)
    wanted = {f"d{q}": [f"p{n}" for n in dict.fromkeys(owners[order[q]].tolist())][:30] for q in range(len(queries))}

    assert lists == {name: each for name, each in wanted.items() if name != "d1"}


def test_only_queries_that_lack_passages_are_asked_again(tmp_path, vectors, monkeypatch):
    """A query beside a passage of very many chunks is asked for more rows by itself, not with the others of its block."""
    near = np.repeat(vectors[:1], 600, axis=0)
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", np.concatenate([vectors, near])))
    ids = pa.array([*(f"d{row}" for row in range(ROWS)), *["long"] * len(near)], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat")
    asked = np.concatenate([vectors[:1], clustered(69, seed=4)])
    write(tmp_path / "queries" / "0.parquet", asked)
    searches: list[tuple[int, int]] = []
    open_piece = mappers.open_piece

    class Watched:
        def __init__(self, path: str):
            self.index = open_piece(path)
            self.ntotal = self.index.ntotal

        def search(self, vectors, most, **more):
            searches.append((len(vectors), most))
            return self.index.search(vectors, most, **more)

    monkeypatch.setattr(mappers, "open_piece", Watched)
    lists = lists_of(found(tmp_path, tmp_path / "queries", top_k=10))
    order = exact(asked, np.concatenate([vectors, near]), ROWS + 600)
    wanted = {f"d{q}": list(dict.fromkeys(ids.to_numpy(zero_copy_only=False)[order[q]]))[:10] for q in range(1, 70)}

    assert searches[0] == (70, 10)
    assert max(most for _, most in searches) > 600
    assert sum(count for count, _ in searches[1:]) < 10
    assert {name: each for name, each in lists.items() if name != "d0"} == wanted
    assert len(set(lists["d0"])) == 10
    assert "long" in lists["d0"]


@pytest.mark.parametrize(("most", "queries"), [(10, 32_768), (100, 20_971), (1000, 2097), (10_000_000, 1)])
def test_a_block_of_queries_has_lists_that_a_worker_can_hold(most, queries):
    """The longer the lists that are asked for, the fewer queries a shard has; one at least."""
    assert block_rows(10_000_000, most) == queries


@pytest.mark.parametrize("many", [False, True])
def test_lists_are_the_same_in_blocks_of_any_size(source, tmp_path, asked, monkeypatch, many):
    """However few queries a worker takes at once, the lists are those of all together."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    whole = found(tmp_path, asked, "whole", top_k=20)
    monkeypatch.setattr("lib.index.search.job.PASSAGES_AT_ONCE", 200)
    monkeypatch.setattr("lib.index.search.mappers.PASSAGES_AT_ONCE", 60)
    table = found(tmp_path, asked, "by-tens", top_k=20)

    assert len(list((tmp_path / "by-tens").glob("part-*"))) == 7
    assert lists_of(table) == lists_of(whole)
    assert table.num_rows == whole.num_rows


def test_a_query_that_finds_nothing_is_kept(source, tmp_path, asked, monkeypatch):
    """Where no allowed passage lies in the probed lists, a query is one row that says so; others are as ever; in many pieces."""
    cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    (tmp_path / "allow.jsonl").write_text('{"id": "d7"}\n')
    table = found(tmp_path, asked, effort=1, allow=str(tmp_path / "allow.jsonl")).to_pylist()

    assert sorted(row["query_id"] for row in table) == sorted(f"d{q}" for q in range(70))
    assert {row["passage_id"] for row in table} == {None, "d7"}
    for row in table:
        if row["query_id"] == "d1":
            assert row["error"] == "empty text"
        else:
            assert (row["error"] or "").startswith("nothing was found") == (row["passage_id"] is None)


def test_rows_without_an_id_are_named_by_their_place(tmp_path, asked, vectors, queries):
    """A null in the id column neither ends a shard nor hides the row: it is FILE#POSITION."""
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors))
    ids = pa.array([None if row % 2 else f"d{row}" for row in range(ROWS)], pa.large_string())
    pq.write_table(table.set_column(0, "id", ids), tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat")
    lists = lists_of(found(tmp_path, asked, top_k=3))
    best = exact(queries, vectors, 3)

    assert lists["d0"] == [f"0.parquet#{n}" if n % 2 else f"d{n}" for n in best[0]]


@pytest.mark.parametrize("many", [False, True])
def test_queries_without_an_id_are_named_by_their_place(source, tmp_path, queries, monkeypatch, many):
    """Queries without an id column, or with a null in it, are FILE#POSITION, FILE as it is called below the input."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    table = pq.read_table(write(tmp_path / "queries" / "a" / "0.parquet", queries[:4]))
    pq.write_table(table.drop_columns(["id"]), tmp_path / "queries" / "a" / "0.parquet")
    named = pq.read_table(write(tmp_path / "named" / "0.parquet", queries[:4], absent=(2,)))
    ids = pa.array(["first", None, None, "last"], pa.large_string())
    pq.write_table(named.set_column(0, "id", ids), tmp_path / "named" / "0.parquet")
    built(source, tmp_path / "index", kind="flat", shard_rows=300)
    unnamed, some = (found(tmp_path, tmp_path / name, f"found-{name}", top_k=3) for name in ("queries", "named"))

    assert set(unnamed["query_id"].to_pylist()) == {f"a/0.parquet#{n}" for n in range(4)}
    assert set(some["query_id"].to_pylist()) == {"first", "0.parquet#1", "0.parquet#2", "last"}


def test_changed_queries_are_another_search(source, tmp_path, asked, queries):
    """Finished or not, a search does not pass off its old lists for queries that changed or grew: it is refused."""
    built(source, tmp_path / "index", kind="flat")
    found(tmp_path, asked, top_k=5)
    write(asked / "1.parquet", queries[:3], first=100)

    with pytest.raises(RunError, match="files: there"):
        found(tmp_path, asked, top_k=5)


@pytest.mark.parametrize("finished", [True, False])
def test_a_search_of_a_grown_index_is_another(source, tmp_path, asked, monkeypatch, finished):
    """The same command over an index with more vectors is refused: shortly, with how many it had and has, whether it had one piece
    or many, and whether the search had come to its end."""
    built(source, tmp_path / "index", kind="flat", shard_rows=300)
    found(tmp_path, asked, "of-one", top_k=5)
    cut_small(monkeypatch, 4 * DIM * 700)
    counts = []
    for more in (1, 2):
        write(source / f"more-{more}.parquet", clustered(ROWS, seed=more), first=ROWS * more)
        counts.append(built(source, tmp_path / "index", kind="flat", shard_rows=300)["pieces"])
        if more == 1:
            found(tmp_path, asked, "of-many", top_k=5)
    if not finished:
        for path in [tmp_path / "of-many" / "_run.json", *(tmp_path / "of-many").glob("part-*")]:
            path.unlink()

    for name, then in (("of-one", r"3,000 vectors in 1 pieces"), ("of-many", rf"6,000 vectors in {counts[0]} pieces")):
        words = (
            rf"{name} holds lists of an index of {then}, and that at .*index has 9,000 in {counts[1]} now: it has grown"
        )
        with pytest.raises(RunError, match=words) as refused:
            found(tmp_path, asked, name, top_k=5)
        assert len(str(refused.value)) < 400
        assert not list((tmp_path / "of-one").rglob("_pieces"))


def test_the_same_search_goes_on(source, tmp_path, asked, monkeypatch):
    """A search that was stopped makes only the parts that are missing; another one in the same place is refused."""
    cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    whole = found(tmp_path, asked, top_k=5)
    parts = sorted((tmp_path / "found" / "_pieces").glob("part-*"))
    times = {path: path.stat().st_mtime_ns for path in parts[1:]}
    parts[0].unlink()
    for path in [*(tmp_path / "found").glob("part-*"), *(tmp_path / "found").rglob("_manifest.parquet")]:
        path.unlink()

    assert found(tmp_path, asked, top_k=5).equals(whole)
    assert {path: path.stat().st_mtime_ns for path in parts[1:]} == times
    with pytest.raises(Exception, match="most: there 5, asked 6"):
        found(tmp_path, asked, top_k=6)


def test_a_search_on_ray_reports_what_it_did(source, tmp_path, queries, vectors, monkeypatch):
    """Through Ray's workers the lists are the same, and the report has rows and time, and nothing of texts: no tokens, padding or
    model, where queries are vectors. Queries without an id have their file's name there too."""
    cut_small(monkeypatch, 4 * DIM * 1500)
    built(source, tmp_path / "index", kind="flat", max_workers=1)
    table = pq.read_table(write(tmp_path / "queries" / "0.parquet", queries, absent=(1,)))
    pq.write_table(table.drop_columns(["id"]), tmp_path / "queries" / "0.parquet")
    where = {"index": str(tmp_path / "index"), "input": str(tmp_path / "queries"), "output": str(tmp_path / "found")}
    outcome = search(configure(SearchConfig, **where, top_k=5, max_workers=1))
    told = report(outcome, where["output"])
    lists = lists_of(pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "found").glob("part-*"))))
    best = exact(queries, vectors, 5)

    assert lists == {f"0.parquet#{q}": [f"d{n}" for n in best[q]] for q in range(len(queries)) if q != 1}
    assert "346 (1 kept with an error)" in told
    assert "346 rows in" in told
    assert "rows/s" in told
    assert not [word for word in ("token", "padding", "truncated", "model", "equal texts") if word in told]


# Wrong input


@pytest.mark.parametrize("lost", ["pieces/piece-*", "rows/part-*", "rows/_manifest.parquet"])
def test_an_index_that_lost_a_file(source, tmp_path, asked, monkeypatch, lost):
    """A piece or encoded rows that are gone or cut short are named before anything is searched; the build makes them anew."""
    cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    whole = found(tmp_path, asked, "whole", top_k=5)
    first, *more = sorted((tmp_path / "index").glob(lost))
    first.unlink()
    for path in more[:1]:
        path.write_bytes(path.read_bytes()[:1000])

    words = rf"files of the index in .* are gone or not whole, {first.name} the first\. Delete .* and start the command again"
    with pytest.raises(InputError, match=words):
        found(tmp_path, asked, top_k=5)
    for path in more[:1]:
        path.unlink()
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=300)
    assert found(tmp_path, asked, top_k=5).equals(whole)


@pytest.mark.parametrize("lost", ["pieces/piece-*", "rows/part-*"])
def test_an_index_that_a_node_does_not_have(source, tmp_path, asked, monkeypatch, lost):
    """A file that a worker does not find, where the driver did, is named with the node and what to do; no try is spent on it."""
    built(source, tmp_path / "index", kind="flat", shard_rows=300)
    plan = sys.modules[search.__module__]._plan

    def planned(*given):
        next((tmp_path / "index").glob(lost)).unlink()
        return plan(*given)

    monkeypatch.setattr("lib.index.search.job._plan", planned)
    with pytest.raises(InputError, match=r"index/(pieces|rows)/.* is not there on the node .*: .* builds the index"):
        found(tmp_path, asked)


def test_an_index_that_is_not_finished(source, tmp_path, asked):
    """A folder without a card is told, with the next action."""
    with pytest.raises(InputError, match="no finished index at"):
        found(tmp_path, asked)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"effort": 4}, "--effort 4: flat searches everything"),
        ({"reranker": "x"}, "give --corpus"),
        ({"allow": "nothing"}, "nothing at nothing"),
        ({"id_column": "name"}, "no column 'name'"),
    ],
)
def test_wrong_commands_are_answered(source, tmp_path, asked, more, words):
    """A wrong value is named with the next action."""
    built(source, tmp_path / "index", kind="flat")

    with pytest.raises((UsageError, InputError), match=words):
        found(tmp_path, asked, **more)


@pytest.mark.parametrize("type", [pa.list_(pa.float32()), pa.list_(pa.float32(), DIM)])
def test_queries_without_a_row_are_refused(source, tmp_path, type):
    """A file of no queries is told, with the next action, whether its vectors would be of a fixed length or not."""
    built(source, tmp_path / "index", kind="flat")
    (tmp_path / "none").mkdir()
    columns = [("id", pa.string()), ("embedding", type)]
    pq.write_table(pa.schema(columns).empty_table(), tmp_path / "none" / "0.parquet")

    with pytest.raises(InputError, match=r"none has no rows: .* Give it queries, or correct --input"):
        found(tmp_path, tmp_path / "none")


@pytest.mark.parametrize("many", [False, True])
def test_an_id_of_several_queries_is_refused(source, tmp_path, queries, monkeypatch, many):
    """Their lists could not be told apart: the ids are named, with how often they come; before anything is searched."""
    if many:
        cut_small(monkeypatch, 4 * DIM * 700)
    built(source, tmp_path / "index", kind="flat", shard_rows=300)
    write(tmp_path / "queries" / "0.parquet", queries)
    for name in ("1", "2"):
        write(tmp_path / "queries" / f"{name}.parquet", queries[:1], first=7)

    with pytest.raises(
        InputError, match=r"1 query ids come more than once in .*queries: 'd7' \(3 times\)\. An id must"
    ):
        found(tmp_path, tmp_path / "queries")
    assert not list((tmp_path / "found").rglob("part-*"))

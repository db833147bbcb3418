"""What the rerank job makes: scores, rows, ranks; joins, whole, on a real local Ray; bad input, resume."""

import json
import os
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.errors import InputError, ModelError, UsageError
from lib.reranking import candidates
from lib.reranking.config import RerankConfig
from lib.reranking.job import dry_run, rerank
from lib.reranking.mapper import ranks
from tests.support import tiny
from tests.support.messages import listen

PASSAGES = [f"passage {i} " + "about fish and water " * (i % 9) for i in range(200)]
QUERIES = [f"which fish is number {i}" for i in range(20)]
CANDIDATES = [(q, (q * 7 + 3 * i) % 200) for i in range(10) for q in range(20)]  # a query's passages are far apart


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.build_reranker("bert", tmp_path_factory.mktemp("reranker")))


@pytest.fixture
def data(tmp_path):
    """Pairs of texts, and the same as candidates with queries and a corpus."""
    pairs = {"id": [f"{q}-{p}" for q, p in CANDIDATES], "query": [QUERIES[q] for q, _ in CANDIDATES]}
    write(tmp_path / "pairs" / "a.parquet", pairs | {"passage": [PASSAGES[p] for _, p in CANDIDATES]})
    ids = {"query_id": [f"q{q}" for q, _ in CANDIDATES], "passage_id": [p for _, p in CANDIDATES]}
    write(tmp_path / "candidates" / "a.parquet", ids | {"found": [i / 10 for i in range(len(CANDIDATES))]})
    write(tmp_path / "queries.parquet", {"_id": [f"q{q}" for q in range(20)], "text": QUERIES})
    write(tmp_path / "corpus" / "a.parquet", {"id": range(120), "text": PASSAGES[:120]})
    write(tmp_path / "corpus" / "b.parquet", {"id": range(120, 200), "text": PASSAGES[120:]})
    return tmp_path


def write(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=37)


def config(data, directory, **changes):
    settings = {"input": str(data / "pairs"), "output": str(data / "out"), "model": directory, "dtype": "float32"}
    return configure(RerankConfig, **(settings | {"max_workers": 1} | changes))


def run(data, directory, **changes):
    said = listen()
    return rerank(config(data, directory, **changes)), said


def run_here(data, directory, **changes):
    return run(data, directory, **({"executor": "local"} | changes))


def joined(data, model, **changes):
    inputs = {"input": str(data / "candidates"), "queries": str(data / "queries.parquet")}
    return run(data, model, corpus=str(data / "corpus"), **(inputs | changes))


def rows(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("part-*.parquet")))


@pytest.fixture(scope="module")
def reference(model):
    """sentence-transformers' own scores, by candidate."""
    from sentence_transformers import CrossEncoder

    texts = [(QUERIES[q], PASSAGES[p]) for q, p in CANDIDATES]
    return dict(zip(CANDIDATES, CrossEncoder(model, device="cpu").predict(texts), strict=True))


def test_scores_are_sentence_transformers(data, model, reference):
    """Every pair comes once, in order, with CrossEncoder's score; the parts say what made them."""
    run_here(data, model, shard_rows=60)
    table = rows(data / "out")

    assert table["id"].to_pylist() == [f"{q}-{p}" for q, p in CANDIDATES]
    np.testing.assert_allclose(table["score"].to_numpy(), list(reference.values()), atol=1e-4)
    assert table["error"].null_count == len(CANDIDATES)
    parts = sorted((data / "out").glob("part-*.parquet"))
    assert len(parts) > 1
    about = json.loads(pq.read_schema(parts[0]).metadata[b"shoal"])
    assert (about["activation"], about["dtype"]) == ("sigmoid", "float32")


def test_candidates_are_joined_by_id(data, model, reference):
    """Every candidate comes once, with the score of its texts, whatever files they lie in; its query's rows lie side by
    side. What cannot be joined, unknown ids, null ids, empty texts, stays with its reason; of two passages with one id
    the first counts. A second identical command does nothing; after a loss, of the scores and of parts of the join, it
    makes them again, the same."""
    write(data / "corpus" / "c.parquet", {"id": [5, 900], "text": ["another five", "  "]})
    odd = [("odd", 5), ("odd", 900), ("odd", 901), ("nobody", 5), (None, None)]
    pairs = [(f"q{q}", p) for q, p in CANDIDATES] + odd
    ids = {"query_id": [q for q, _ in pairs], "passage_id": [p for _, p in pairs]}
    write(data / "candidates" / "a.parquet", ids | {"found": [i / 10 for i in range(len(pairs))]})
    write(data / "queries.parquet", {"_id": [*(f"q{q}" for q in range(20)), "odd"], "text": [*QUERIES, QUERIES[0]]})
    place = data / "found=9" / "out"  # a folder that looks like a column
    joined(data, model, executor="local", output=str(place), keep_columns=("found",))
    table = rows(place).to_pylist()

    assert sorted(row["found"] for row in table) == [i / 10 for i in range(len(pairs))]
    whole = [row for row in table if (row["query_id"] or "")[:1] == "q"]
    assert len(whole) == len(CANDIDATES)
    for row in whole:
        assert row["error"] is None
        assert row["score"] == pytest.approx(reference[int(row["query_id"][1:]), row["passage_id"]], abs=1e-4)
    order = [row["query_id"] for row in whole]
    assert len([1 for one, other in pairwise(order) if one != other]) == 19
    rest = {(row["query_id"], row["passage_id"]): row for row in table if row not in whole}
    assert {pair: row["error"] for pair, row in rest.items()} == {
        ("odd", 5): None,
        ("odd", 900): "passage: empty text",
        ("odd", 901): "no passage with the id 901",
        ("nobody", 5): "no query with the id nobody",
        (None, None): "null passage_id",
    }
    assert [row["score"] for row in rest.values()].count(None) == 4
    _, said = joined(data, model, executor="local", output=str(place), keep_columns=("found",))
    assert "nothing to do" in said[-1]

    (join,) = (place / "_stages").glob("join-*")
    for path in [*(place).glob("*.*"), *(join / "pairs").iterdir()]:
        if path.is_file():
            os.unlink(path)
    os.unlink(next((join / "candidates").glob("part-*")))
    os.unlink(join / "candidates" / "_manifest.parquet")
    joined(data, model, executor="local", output=str(place), keep_columns=("found",))
    assert sorted(map(str, rows(place).to_pylist())) == sorted(map(str, table))


def test_the_best_of_each_query_are_ranked(data, model, reference):
    """--top-k keeps the best passages of each query with their rank; rows with an error stay, without one."""
    pairs = [*((f"q{q}", p) for q, p in CANDIDATES), ("nobody", 5)]
    ids = {"query_id": [q for q, _ in pairs], "passage_id": [p for _, p in pairs]}
    write(data / "candidates" / "a.parquet", ids)
    joined(data, model, executor="local", top_k=3)
    table = rows(data / "out").to_pylist()

    for q in range(20):
        best = {row["rank"]: row["score"] for row in table if row["query_id"] == f"q{q}"}
        scores = sorted((reference[c] for c in CANDIDATES if c[0] == q), reverse=True)
        assert sorted(best) == [1, 2, 3]
        np.testing.assert_allclose([best[rank] for rank in (1, 2, 3)], scores[:3], atol=1e-5)
    rest = [(row["rank"], row["error"]) for row in table if row["query_id"] == "nobody"]
    assert rest == [(None, "no query with the id nobody")]
    assert len(table) == 61


def test_a_join_of_changed_inputs_is_made_anew(data, model):
    """A join is named by its inputs: where they changed before the scoring began, no row of the old ones is taken."""
    config_of_join = config(
        data,
        model,
        executor="local",
        input=str(data / "candidates"),
        queries=str(data / "queries.parquet"),
        corpus=str(data / "corpus"),
    )
    candidates.join(config_of_join)
    write(data / "queries.parquet", {"_id": [f"q{q}" for q in range(20)], "text": [f"new {q}" for q in QUERIES]})
    plan, _ = candidates.join(config_of_join)

    joins = list((data / "out" / "_stages").glob("join-*"))
    assert len(joins) == 2
    assert len({path.split("/_stages/")[1].split("/")[0] for path in plan["path"].to_pylist()}) == 1


def test_dry_run_tells_plan_tokens_and_cost(cluster, data, model):
    """--dry-run measures pairs as they are, and candidates with texts like theirs, before anything is joined or written."""
    options = {"output": str(data / "out"), "model": model}
    pairs = dry_run(configure(RerankConfig, input=str(data / "pairs"), **options))
    inputs = {"queries": str(data / "queries.parquet"), "corpus": str(data / "corpus")}
    by_id = dry_run(configure(RerankConfig, input=str(data / "candidates"), **inputs, **options))

    assert pairs.planner.corpus.rows == by_id.planner.corpus.rows == len(CANDIDATES)
    assert by_id.tokens_a_row == pytest.approx(pairs.tokens_a_row, rel=0.3)
    assert "cost" in "\n".join(by_id.lines(price_per_hour=2.0))
    assert not (data / "out").exists()


def test_pairs_without_a_text_are_kept_with_a_reason(data, model):
    """A null or blank text gives a row without a score and with the side that lacks it; --strict stops at it."""
    texts = {"query": ["a", None, "b"], "passage": ["x", "y", " "], "id": ["1", "2", "3"]}
    write(data / "pairs" / "a.parquet", texts)
    with pytest.raises(InputError, match="query: null text"):
        run_here(data, model, strict=True, output=str(data / "strict"))
    run_here(data, model)

    assert rows(data / "out")["error"].to_pylist() == [None, "query: null text", "passage: empty text"]
    assert rows(data / "out")["score"].is_null().to_pylist() == [False, True, True]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"queries": "q.parquet"}, UsageError, "--corpus and --queries go together"),
        ({"top_k": 3}, UsageError, "--top-k needs candidates"),
        ({"keep_columns": ("score",)}, UsageError, "column 'score'"),
        ({"queries": "q", "corpus": "c", "query_id_column": "query"}, UsageError, "column 'query'"),
        ({"text_column": "body"}, InputError, "body"),
        ({"recipe": "piccolo-zh"}, UsageError, "embed_corpus"),
        ({"instruction": "judge"}, UsageError, "takes none"),
        ({"model": "/nowhere"}, ModelError, "/nowhere"),
    ],
)
def test_what_cannot_work_is_told_at_once(data, model, changes, error, said):
    """Wrong options, columns and models are named by the driver, before a cluster is asked for anything."""
    with pytest.raises(error, match=said):
        run(data, model, **changes)


def test_ranks_go_by_score_within_a_query():
    """Equal scores keep the order of the rows; what has no score has no rank."""
    scores = pa.array([0.5, 0.9, None, 0.5, 0.1], pa.float32())
    assert ranks(scores, pa.array([1, 1, 1, 1, 2])).to_pylist() == [2, 1, None, 3, 1]
    assert ranks(pa.array([], pa.float32()), pa.array([], pa.int64())).to_pylist() == []

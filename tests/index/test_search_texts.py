"""jobs/search_index.py with queries as texts: they are embedded with the index's model, or refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.errors import InputError, ModelError, UsageError
from lib.recipes import load
from tests.support import tiny
from tests.support.indexed import ENCODER, built, clustered, write
from tests.support.searched import hits_of, lists_of, read_hits


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(3000)


@pytest.fixture
def texts(build, tmp_path):
    """An index of sentences by a tiny model with prompts; the folder of the corpus and of the queries."""
    from lib.embedding.config import EmbedConfig
    from lib.embedding.job import embed

    model = build("bert", prompts={"query": "ask: ", "passage": ""})
    rng = np.random.default_rng(0)
    words = sorted({word for text in tiny.TEXT for word in text.split()})
    lines = [" ".join(rng.choice(words, 6)) for _ in range(400)]
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"id": f"p{n}", "text": t}) + "\n" for n, t in enumerate(lines))
    )
    queries = [{"id": f"q{n}", "text": line} for n, line in enumerate(lines[:30])] + [{"id": "q30", "text": ""}]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    options = configure(
        EmbedConfig,
        input=str(tmp_path / "docs.jsonl"),
        output=str(tmp_path / "embedded"),
        model=str(model),
        dtype="float32",
        executor="local",
    )
    embed(options)
    built(tmp_path / "embedded", tmp_path / "index", kind="flat")
    return model


def test_texts_are_embedded_with_the_card_s_model_and_query_prompt(texts, tmp_path):
    """Queries as texts need no --model: the card's model encodes them with its query prompt, as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer

    table = hits_of(tmp_path, tmp_path / "queries.jsonl", top_k=3, dtype="float32")
    reference = SentenceTransformer(str(texts), device="cpu")
    queries = [json.loads(line)["text"] for line in (tmp_path / "queries.jsonl").read_text().splitlines()][:30]
    passages = [json.loads(line)["text"] for line in (tmp_path / "docs.jsonl").read_text().splitlines()]
    left = reference.encode(queries, prompt="ask: ", normalize_embeddings=True)
    right = reference.encode(passages, prompt="", normalize_embeddings=True)
    top = np.sort(left @ right.T, axis=1)[:, ::-1][:, :3]
    scores = np.array([row["score"] for row in table.to_pylist() if row["query_id"] != "q30"]).reshape(30, 3)

    np.testing.assert_allclose(scores, top, atol=1e-5)
    (lacking,) = [row for row in table.to_pylist() if row["query_id"] == "q30"]
    assert lacking["error"]


def test_texts_without_an_id_are_named_by_their_place(texts, tmp_path):
    """They are named after the file of the texts, not of their vectors."""
    (tmp_path / "queries.jsonl").write_text('{"text": "a text"}\n{"text": "another text"}\n')
    names = hits_of(tmp_path, tmp_path / "queries.jsonl", top_k=3)["query_id"].to_pylist()

    assert set(names) == {"queries.jsonl#0", "queries.jsonl#19"}


def test_texts_for_an_index_of_cut_vectors(texts, tmp_path):
    """For an index of a model's first dimensions, queries are embedded in as many."""
    from lib.embedding.config import EmbedConfig
    from lib.embedding.job import embed

    about = json.loads((texts / "config.json").read_text())
    (texts / "config.json").write_text(json.dumps(about | {"is_matryoshka": True}))
    options = configure(
        EmbedConfig,
        input=str(tmp_path / "docs.jsonl"),
        output=str(tmp_path / "short"),
        model=str(texts),
        truncate_dim=16,
        executor="local",
    )
    embed(options)
    card = built(tmp_path / "short", tmp_path / "index16", kind="flat")
    table = hits_of(tmp_path, tmp_path / "queries.jsonl", index=str(tmp_path / "index16"), top_k=3)

    assert card["dim"] == 16
    assert len(lists_of(table)) == 30


def test_the_recipe_of_the_vectors_is_the_queries_too(texts, build, tmp_path):
    """For vectors of a recipe, queries have the recipe's query prompt by default, and not its template of passages."""
    from lib.embedding.config import EmbedConfig
    from lib.embedding.job import embed

    plain = build("bert")
    options = configure(
        EmbedConfig,
        input=str(tmp_path / "docs.jsonl"),
        output=str(tmp_path / "by-recipe"),
        model=str(plain),
        recipe="zhinao-search",
        text_template="{text}",  # the recipe's has a title
        max_tokens=64,
        executor="local",
    )
    embed(options)
    card = built(tmp_path / "by-recipe", tmp_path / "index-by-recipe", kind="flat")
    hits_of(tmp_path, tmp_path / "queries.jsonl", index=str(tmp_path / "index-by-recipe"), top_k=3)
    (vectors,) = (tmp_path / "hits").glob("_stages/queries-*")
    stored = json.loads(pq.read_schema(next(vectors.glob("part-*"))).metadata[b"shoal"])

    assert card["encoder"]["recipe"] == stored["recipe"] == "zhinao-search"
    assert stored["prompt"] == load("zhinao-search").prompts["query"] != ""


def test_another_model_than_the_card_s_is_refused(texts, build, tmp_path):
    """Queries by another model, as --model or as vectors, are refused before anything is embedded."""
    other = build("bert", pooling="cls")
    write(tmp_path / "vectors" / "0.parquet", clustered(20), model="other", revision="r9")
    write(tmp_path / "wide" / "0.parquet", clustered(20, dim=64))

    with pytest.raises(ModelError, match="is not the model of the index"):
        hits_of(tmp_path, tmp_path / "queries.jsonl", model=str(other))
    with pytest.raises(InputError, match=r"queries at .* are vectors of other in 32 dimensions"):
        hits_of(tmp_path, tmp_path / "vectors")
    with pytest.raises(InputError, match="in 64 dimensions"):
        hits_of(tmp_path, tmp_path / "wide")
    assert not list((tmp_path / "hits").glob("_stages/queries-*"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"allow": "nothing"}, "nothing at nothing"),
        ({"reranker": "", "corpus": "nothing"}, "nothing at nothing"),
        ({"reranker": "", "id_column": "text"}, "--id-column id"),
        ({"reranker": "", "corpus_text_column": "body"}, "no column 'body'"),
        ({"reranker": "", "corpus_id_column": "docid"}, "no column 'docid'"),
    ],
)
def test_a_wrong_command_is_refused_before_queries_are_embedded(texts, tmp_path, more, words):
    """A missing list of ids or corpus, and columns that the reranker would lack, are refused before any query is embedded."""
    if "reranker" in more:
        options = {
            "corpus": str(tmp_path / "docs.jsonl"),
            "reranker": str(tiny.build_reranker("bert", tmp_path / "reranker")),
        }
        more = options | {name: value for name, value in more.items() if value}

    with pytest.raises((UsageError, InputError), match=words):
        hits_of(tmp_path, tmp_path / "queries.jsonl", **more)
    assert not list((tmp_path / "hits").rglob("queries-*"))


def test_hits_are_reranked(texts, tmp_path):
    """--reranker scores every hit with the texts of both, and ranks the hits by that."""
    model = tiny.build_reranker("bert", tmp_path / "reranker")
    more = {"reranker": str(model), "corpus": str(tmp_path / "docs.jsonl"), "top_k": 5}
    table = hits_of(tmp_path, tmp_path / "queries.jsonl", **more)
    candidates = read_hits(tmp_path / "hits" / "_stages" / "candidates")
    expected = {(row["query_id"], row["passage_id"]) for row in candidates.to_pylist()}

    assert {(row["query_id"], row["passage_id"]) for row in table.to_pylist()} == expected
    ranked = sorted((row["rank"], row["score"]) for row in table.to_pylist() if row["query_id"] == "q3")
    assert [rank for rank, _ in ranked] == [1, 2, 3, 4, 5]
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)


def test_a_list_of_other_ids_is_refused(texts, tmp_path):
    """Allowed ids, none of which the index has, are refused before queries are embedded, with one of them."""
    (tmp_path / "allow.jsonl").write_text('{"id": "q1"}\n{"id": "q2"}\n')

    with pytest.raises(
        InputError, match=r"none of the 2 ids of --allow .*allow.jsonl is in the index .*, 'q1' the first"
    ):
        hits_of(tmp_path, tmp_path / "queries.jsonl", allow=str(tmp_path / "allow.jsonl"))
    assert not list((tmp_path / "hits").glob("_stages/queries-*"))


def test_an_id_of_several_texts_is_refused_before_they_are_embedded(texts, tmp_path):
    """A repeated id of texts is refused as that of vectors is; a query without an id has a name of its own."""
    rows = [{"id": name, "text": "a text"} for name in ("q", None, None, "q")]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    with pytest.raises(InputError, match=r"1 query ids come more than once in .*queries.jsonl: 'q' \(2 times\)"):
        hits_of(tmp_path, tmp_path / "queries.jsonl")
    assert not list((tmp_path / "hits").glob("_stages/queries-*"))


def test_texts_for_an_index_of_unknown_vectors(tmp_path, vectors):
    """An index of vectors from elsewhere names no model: texts need --model."""
    table = pq.read_table(write(tmp_path / "vectors" / "0.parquet", vectors)).replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "vectors" / "0.parquet")
    built(tmp_path / "vectors", tmp_path / "index", kind="flat")
    (tmp_path / "queries.jsonl").write_text('{"id": "q", "text": "a text"}\n')

    assert ENCODER["model"] not in (tmp_path / "index" / "card.json").read_text()
    with pytest.raises(UsageError, match="does not know which model"):
        hits_of(tmp_path, tmp_path / "queries.jsonl")

"""The embed job whole, in this process, with the real MiniLM on a real local Ray: vectors, rows, bad input, resume."""

import json
import os
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.vectors import quantise, to_column
from lib.embedding.job import dry_run
from lib.engine.report import exit_code, report
from lib.errors import InputError
from tests.support.embedded import TEXTS, config, matrix, rows, run, run_here, write_docs


@pytest.fixture(scope="session")
def reference(minilm):
    """sentence-transformers' own vectors."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm, device="cpu").encode


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory, minilm):
    """A corpus embedded in three shards, and how that ended."""
    docs = write_docs(tmp_path_factory.mktemp("whole"))
    outcome, _ = run(docs, minilm, shard_rows=100, keep_columns=("n",))
    return docs, outcome


def test_vectors_are_sentence_transformers(whole, reference):
    """Every row comes once, in order, with the vector that sentence-transformers gives its text; the parts say what
    made them; the report counts."""
    docs, outcome = whole
    table = rows(docs.parent / "out")

    assert table["id"].to_pylist() == [f"d{i}" for i in range(300)]
    assert table["n"].to_pylist() == list(range(300))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 384)
    np.testing.assert_allclose(matrix(table), reference(TEXTS), atol=1e-5)
    about = json.loads(pq.read_schema(next((docs.parent / "out").glob("part-*"))).metadata[b"shoal"])
    assert about["revision"].startswith("weights-")
    assert (about["pooling"], about["dim"], about["normalized"], about["dtype"]) == (["mean"], 384, True, "float32")
    assert "300 (0 kept with an error" in report(outcome, "out")
    assert exit_code(outcome) == 0


def test_a_second_command_does_nothing(whole, minilm):
    """The same command on a finished run says so and touches no file."""
    docs, _ = whole
    before = {path.name: path.stat().st_mtime_ns for path in (docs.parent / "out").iterdir()}
    _, said = run(docs, minilm, shard_rows=100, keep_columns=("n",))

    assert said == [f"nothing to do: all 3 shards are in {docs.parent / 'out'}"]
    assert {path.name: path.stat().st_mtime_ns for path in (docs.parent / "out").iterdir()} == before


def test_a_resumed_shard_has_the_same_bits(whole, minilm):
    """A part made again after a loss is the same part, to the checksum of its data."""
    docs, first = whole
    os.unlink(docs.parent / "out" / first.parts[1].part)
    os.unlink(docs.parent / "out" / "_manifest.parquet")
    second, _ = run(docs, minilm, shard_rows=100, keep_columns=("n",))

    assert second.parts == first.parts
    assert second.progress.counts["rows"] == 100


def test_rows_without_an_id_are_counted(tmp_path, minilm):
    """A null or missing id stays null, with its vector, and the report counts such rows."""
    (tmp_path / "in").mkdir()
    lines = [
        '{"id": "a", "text": "one"}',
        '{"id": null, "text": "two"}',
        '{"text": "three"}',
        '{"id": "", "text": "four"}',
    ]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    outcome, _ = run_here(tmp_path / "in", minilm)
    table = rows(tmp_path / "out")

    assert table["id"].to_pylist() == ["a", None, None, ""]
    assert table["embedding"].null_count == 0
    assert "ids       2 rows of this run have none" in report(outcome, "out")


def test_bad_rows_are_kept_with_a_reason(tmp_path, minilm, reference):
    """Null, empty and blank texts, damaged lines and files, wrong encodings, duplicate ids, an empty file and a 5 MB
    document in one corpus: every row is in the output, the good ones with their vectors, the bad ones with a reason."""
    folder = tmp_path / "in"
    folder.mkdir()
    long = "A long document about the sea. " * 170_000
    texts = ["first", None, "", " \n\t ", long, "twin", "twin", "last"]
    ids = ["a", "b", "c", "d", "e", "same", "same", "f"]
    pq.write_table(pa.table({"id": ids, "text": texts}), folder / "a.parquet")
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), folder / "b.parquet")
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 4, 8], pa.int32()).buffers()[1], pa.py_buffer(b"caf\xe9good")]
    )
    pq.write_table(pa.table({"id": ["x", "y"], "text": broken}), folder / "c.parquet")
    (folder / "d.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-30])
    (folder / "e.jsonl").write_bytes(b'{"id": "j", "text": "from a line"}\nnot json\n{"id": "k"}\n')
    (folder / "f.jsonl").write_bytes(b"")

    outcome, _ = run_here(folder, minilm, id_column="id")
    table = rows(tmp_path / "out")
    got = {(row["id"], i): row for i, row in enumerate(table.to_pylist())}
    good = {key[0]: row for key, row in got.items() if row["error"] is None}
    reasons = [row["error"] for row in got.values() if row["error"]]

    assert len(table) == 8 + 2 + 1 + 3
    assert set(good) == {"a", "e", "same", "f", "y", "j"}
    assert sum(row["id"] == "same" for row in got.values()) == 2
    assert good["e"]["truncated"]
    assert all(row["embedding"] is None for row in got.values() if row["error"])
    for words in ("null text", "empty text", "not UTF-8", "unreadable file", "not JSON"):
        assert any(words in reason for reason in reasons), words
    np.testing.assert_allclose(good["e"]["embedding"], reference(long), atol=1e-5)
    np.testing.assert_allclose(good["j"]["embedding"], reference("from a line"), atol=1e-5)
    assert "14 (7 kept with an error, 1 truncated)" in report(outcome, "out")


def test_strict_stops_at_a_bad_row(tmp_path, minilm):
    """--strict ends the run at the first bad row, naming file, place and reason."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "good"}\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"a\.jsonl#17: empty text"):
        run_here(tmp_path / "in", minilm, strict=True)


def test_chunks(tmp_path, minilm, reference):
    """--chunk-tokens gives 1 to n rows a text; each chunk's vector is that of text[start:end]; together they cover it."""
    (tmp_path / "in").mkdir()
    text = " ".join(f"sentence number {i} speaks of rivers, lakes and harbours." for i in range(40))
    pq.write_table(
        pa.table({"id": ["long", "short", "none"], "text": [text, "brief", None]}), tmp_path / "in" / "a.parquet"
    )
    run_here(tmp_path / "in", minilm, chunk_tokens=50, chunk_overlap=10)
    table = rows(tmp_path / "out").to_pylist()
    chunks = [row for row in table if row["id"] == "long"]

    assert [row["id"] for row in table if row["id"] != "long"] == ["short", "none"]
    assert len(chunks) > 8
    assert [row["chunk"] for row in chunks] == list(range(len(chunks)))
    assert (chunks[0]["start"], chunks[-1]["end"]) == (0, len(text))
    assert all(a["start"] < b["start"] < a["end"] < b["end"] for a, b in pairwise(chunks))
    assert all(row["tokens"] <= 52 and not row["truncated"] for row in chunks)
    expected = reference([text[row["start"] : row["end"]] for row in chunks])
    np.testing.assert_allclose(np.array([row["embedding"] for row in chunks]), expected, atol=1e-5)


def test_output_types(docs, minilm, reference):
    """int8 (ranges made once a run, kept, and used by every shard) means what sentence-transformers means by it; so do
    float16 and ubinary, which need nothing of a run."""
    from sentence_transformers.util import quantize_embeddings

    run_here(docs, minilm, output_dtype="int8", shard_rows=100)
    vectors = matrix(rows(docs.parent / "out"))
    exact = reference(TEXTS)

    ranges = np.array(json.loads((docs.parent / "out" / "_int8.json").read_text()))
    expected = quantize_embeddings(exact, "int8", ranges=ranges)
    assert (vectors != expected).mean() < 1e-3  # a step's border may fall between two roundings
    assert np.abs(vectors.astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(quantise(exact, "ubinary"), quantize_embeddings(exact, "ubinary"))
    np.testing.assert_array_equal(quantise(exact, "float16"), exact.astype(np.float16))
    for dtype, width in (("float16", 384), ("ubinary", 48)):
        column = to_column(quantise(exact, dtype), pa.array([1, None, 0], pa.int32()))
        assert (column.type.list_size, column.null_count) == (width, 1)
        assert column[2].as_py() == quantise(exact, dtype)[0].tolist()


def test_template_prompt_and_recipe(docs, minilm, reference):
    """--text-template joins columns, --prompt goes before the text, a recipe fixes the length."""
    run_here(docs, minilm, text_template="{id}: {text}", prompt="passage: ", recipe="all-minilm-l6-v2", limit=20)
    table = rows(docs.parent / "out")

    assert len(table) == 20
    expected = reference([f"passage: d{i}: {TEXTS[i].strip()}" for i in range(20)])
    np.testing.assert_allclose(matrix(table), expected, atol=1e-5)


def test_dry_run_tells_plan_tokens_memory_and_cost(cluster, docs, minilm):
    """--dry-run writes nothing and says rows, shards, tokens from a sample, memory, time and, with a price, dollars."""
    plan = dry_run(config(docs, minilm))
    lines = "\n".join(plan.lines(price_per_hour=2.5))

    assert plan.planner.corpus.rows == 300
    assert 10 < plan.tokens_a_row < 60
    for words in (
        "300 rows in 1 files",
        "tokens",
        "GiB of memory",
        "tokens/s a worker, measured here",
        "cost      about $",
    ):
        assert words in lines
    assert not (docs.parent / "out").exists()

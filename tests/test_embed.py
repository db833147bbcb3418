"""The embed job whole, in this process, with the real MiniLM on a real local Ray: vectors, rows, bad input, resume."""

import json
import os
import subprocess
import time
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.embed import embed
from lib.embedding import EmbedConfig
from lib.errors import InputError, ModelError, RunError, ShoalError, StorageError, UsageError
from lib.estimate import estimate
from lib.report import exit_code, report

TEXTS = [f"document {i} " + "about fish and water " * (i % 9) for i in range(300)]


@pytest.fixture
def docs(tmp_path):
    """A small corpus: one Parquet file of 300 rows."""
    (tmp_path / "in").mkdir()
    table = pa.table({"id": [f"d{i}" for i in range(300)], "text": TEXTS, "n": range(300)})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    return tmp_path / "in"


def config(docs, minilm, **changes):
    settings = {"input": str(docs), "output": str(docs.parent / "out"), "model": minilm, "dtype": "float32"}
    return EmbedConfig(**(settings | changes))


def run(*words, **changes):
    said: list[str] = []
    outcome = embed(config(*words, **changes), said.append)
    return outcome, said


def rows(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("part-*.parquet")))


def matrix(table):
    column = table["embedding"].combine_chunks()
    return column.values.to_numpy().reshape(len(column), -1)


@pytest.fixture(scope="session")
def reference(minilm):
    """sentence-transformers' own vectors."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm, device="cpu").encode


def test_vectors_are_sentence_transformers(cluster, docs, minilm, reference):
    """Every row comes once, in order, with the vector that sentence-transformers gives its text; the parts say what
    made them; the report counts; a second identical command does nothing."""
    outcome, _ = run(docs, minilm, shard_rows=100, keep_columns=("n",))
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

    before = {path.name: path.stat().st_mtime_ns for path in (docs.parent / "out").iterdir()}
    _, said = run(docs, minilm, shard_rows=100, keep_columns=("n",))
    assert said == [f"nothing to do: all 3 shards are in {docs.parent / 'out'}"]
    assert {path.name: path.stat().st_mtime_ns for path in (docs.parent / "out").iterdir()} == before


def test_a_resumed_shard_has_the_same_bits(cluster, docs, minilm):
    """A part made again after a loss is the same part, to the checksum of its data."""
    first, _ = run(docs, minilm, shard_rows=100)
    os.unlink(docs.parent / "out" / first.parts[1].part)
    os.unlink(docs.parent / "out" / "_manifest.parquet")
    second, _ = run(docs, minilm, shard_rows=100)

    assert second.parts == first.parts
    assert second.progress.rows == 100


def test_bad_rows_are_kept_with_a_reason(cluster, tmp_path, minilm, reference):
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

    outcome, _ = run(folder, minilm, id_column="id")
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


def test_strict_stops_at_a_bad_row(cluster, tmp_path, minilm):
    """--strict ends the run at the first bad row, naming file, place and reason."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "good"}\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"a\.jsonl#17: empty text"):
        run(tmp_path / "in", minilm, strict=True)


def test_chunks(cluster, tmp_path, minilm, reference):
    """--chunk-tokens gives 1 to n rows a text; each chunk's vector is that of text[start:end]; together they cover it."""
    (tmp_path / "in").mkdir()
    text = " ".join(f"sentence number {i} speaks of rivers, lakes and harbours." for i in range(40))
    pq.write_table(
        pa.table({"id": ["long", "short", "none"], "text": [text, "brief", None]}), tmp_path / "in" / "a.parquet"
    )
    run(tmp_path / "in", minilm, chunk_tokens=50, chunk_overlap=10)
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


@pytest.mark.parametrize("dtype", ["float16", "int8", "ubinary"])
def test_output_types(cluster, docs, minilm, reference, dtype):
    """float16, int8 (ranges made once a run, kept, and used by every shard) and ubinary mean what
    sentence-transformers means by them."""
    from sentence_transformers.util import quantize_embeddings

    run(docs, minilm, output_dtype=dtype, shard_rows=100)
    vectors = matrix(rows(docs.parent / "out"))
    exact = reference(TEXTS)

    if dtype == "float16":
        np.testing.assert_allclose(vectors, exact, atol=1e-3)
    elif dtype == "ubinary":
        differing = np.unpackbits(vectors ^ quantize_embeddings(exact, "ubinary"))
        assert differing.mean() < 1e-4
    else:
        ranges = np.array(json.loads((docs.parent / "out" / "_int8.json").read_text()))
        expected = quantize_embeddings(exact, "int8", ranges=ranges)
        assert (vectors != expected).mean() < 1e-3  # a step's border may fall between two roundings
        assert np.abs(vectors.astype(int) - expected).max() <= 1


def test_template_prompt_and_recipe(cluster, docs, minilm, reference):
    """--text-template joins columns, --prompt goes before the text, a recipe fixes the length."""
    run(docs, minilm, text_template="{id}: {text}", prompt="passage: ", recipe="all-minilm-l6-v2", limit=20)
    table = rows(docs.parent / "out")

    assert len(table) == 20
    expected = reference([f"passage: d{i}: {TEXTS[i].strip()}" for i in range(20)])
    np.testing.assert_allclose(matrix(table), expected, atol=1e-5)


def broken_model(minilm, tmp_path, *gone):
    """The MiniLM directory without some of its files."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in os.listdir(minilm):
        if name not in gone:
            os.symlink(f"{minilm}/{name}", folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"input": "/nowhere/at/all"}, InputError, "nothing at /nowhere"),
        ({"text_column": "body"}, InputError, "Columns there: id, text, n"),
        ({"id_column": "key"}, InputError, "no column 'key'"),
        ({"keep_columns": ("n", "m")}, InputError, "no column 'm'"),
        ({"model": "/no/such/model"}, ModelError, "/no/such/model"),
        ({"truncate_dim": 64}, ModelError, "64"),
        ({"max_tokens": 5000}, ModelError, "5000"),
        ({"recipe": "unheard-of"}, UsageError, "all-minilm-l6-v2"),
        ({"prompt_name": "query"}, UsageError, "no prompt 'query'"),
        ({"prompt": "a", "prompt_name": "b"}, UsageError, "exclude each other"),
        ({"chunk_tokens": 20, "chunk_overlap": 20}, UsageError, "--chunk-overlap"),
        ({"chunk_tokens": 1000, "chunk_overlap": 600}, UsageError, "leave 254"),
        ({"chunk_tokens": 50, "prompt": "many words " * 124}, UsageError, "leave"),
        ({"keep_columns": ("n", "tokens")}, UsageError, "--keep-columns tokens"),
        ({"output": "{in}/out"}, UsageError, "lies in --input"),
        ({"input": "{in}/**/*.parquet", "output": "{in}/out"}, UsageError, "lies in --input"),
        ({"input": "{in}/a**.parquet"}, UsageError, "not a pattern"),
        ({"storage_option": ("config_kwargs={bad",)}, UsageError, "begins as JSON"),
        ({"text_template": "{text"}, UsageError, "--text-template"),
        ({"storage_option": ("endpoint",)}, UsageError, "KEY=VALUE"),
        ({"output": "/proc/nothing/here"}, StorageError, "/proc/nothing"),
    ],
)
def test_a_wrong_request_is_told_before_anything_starts(docs, minilm, changes, error, said):
    """What cannot work is said by the driver, in seconds, with the value and the choices, and no Ray is started."""
    changes = {k: v.replace("{in}", str(docs)) if isinstance(v, str) else v for k, v in changes.items()}
    began = time.monotonic()
    with pytest.raises(error, match=said.replace("(", r"\(")):
        run(docs, minilm, **changes)
    assert time.monotonic() - began < (15 if "chunk_tokens" in changes else 5)


def test_a_model_without_a_tokenizer_is_told(docs, minilm, tmp_path):
    """A model directory that lacks its tokenizer, or its weights, is named with what is missing."""
    tokenizer = [name for name in os.listdir(minilm) if "token" in name or name == "vocab.txt"]
    with pytest.raises(ModelError, match="tokenizer"):
        run(docs, broken_model(minilm, tmp_path, *tokenizer))


def test_an_empty_corpus_is_told(tmp_path, minilm):
    """A folder without files, with files of no known format, or without a row, is an error that says so."""
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="nothing at"):
        run(tmp_path / "in", minilm)
    (tmp_path / "in" / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(InputError, match=r"Known: \.csv \.json"):
        run(tmp_path / "in", minilm)
    (tmp_path / "in" / "a.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="no rows"):
        run(tmp_path / "in", minilm)
    assert not list((tmp_path / "out").iterdir())  # nothing that would stand in the way once there are rows


def test_an_output_of_other_settings_is_refused(cluster, docs, minilm):
    """A folder that holds other vectors is not mixed with: the settings that differ are named."""
    run(docs, minilm, limit=5)
    with pytest.raises(RunError, match=r"output_dtype: there 'float32', asked 'float16'"):
        run(docs, minilm, limit=5, output_dtype="float16")
    with pytest.raises(RunError, match=r"\(model max_tokens: there 256, asked 128\)"):
        run(docs, minilm, limit=5, max_tokens=128)


def test_damaged_weights_are_told(cluster, docs, minilm, tmp_path):
    """Weights that only a worker can find damaged end the run with the reason."""
    folder = broken_model(minilm, tmp_path, "model.safetensors")
    with open(f"{minilm}/model.safetensors", "rb") as file:
        (tmp_path / "model" / "model.safetensors").write_bytes(file.read()[:1_000_000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        run(docs, folder)


def test_no_store_behind_the_endpoint_is_told(docs, minilm, monkeypatch):
    """A wrong endpoint is an error within seconds, not a storm of retries."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        run(docs, minilm, output="s3://bucket/out")
    assert time.monotonic() - began < 10


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_the_run_goes_on_after(cluster, docs, minilm, tmp_path):
    """A full disk ends the run in one sentence; given space, the same command finishes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(StorageError, match="disk is full"):
            run(docs, minilm, output=str(disk / "out"), shard_rows=100)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        outcome, _ = run(docs, minilm, output=str(disk / "out"), shard_rows=100)
        assert sum(part.rows for part in outcome.parts) == 300
        assert not [name for name in os.listdir(disk / "out") if name.startswith(".")]
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_dry_run_tells_plan_tokens_memory_and_cost(cluster, docs, minilm):
    """--dry-run writes nothing and says rows, shards, tokens from a sample, memory, time and, with a price, dollars."""
    plan = estimate(config(docs, minilm))
    lines = "\n".join(plan.lines(price_per_hour=2.5))

    assert plan.rows == 300
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


def test_every_error_is_one_sentence():
    """What reaches the user is a ShoalError with an exit code of its own."""
    assert {e.exit_code for e in (InputError, ModelError, RunError, StorageError, ShoalError)} == {1}
    assert UsageError.exit_code == 2

"""What a user of the embed job is told when something cannot work: one sentence, in seconds, with the next action."""

import os
import subprocess
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.embedding.job import dry_run
from lib.errors import InputError, ModelError, RunError, ShoalError, StorageError, UsageError
from tests.conftest import use
from tests.support.embedded import config, rows, run, run_here


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
        ({"recipe": "zhinao-search"}, InputError, "no column 'title'"),
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
        ({"max_tokens": 16, "prompt": "query: " * 7}, UsageError, "leaves no token for a text"),
        ({"keep_columns": ("n", "tokens")}, UsageError, "--keep-columns tokens"),
        ({"output": "{in}/out"}, UsageError, "its parts would be read as input"),
        ({"input": "{in}/**/*.parquet", "output": "{in}/out"}, UsageError, "its parts would be read as input"),
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


def test_an_output_of_other_settings_is_refused(docs, minilm):
    """A folder that holds other vectors is not mixed with: the settings that differ are named."""
    run_here(docs, minilm, limit=5)
    with pytest.raises(RunError, match=r"output_dtype: there 'float32', asked 'float16'"):
        run(docs, minilm, limit=5, output_dtype="float16")
    with pytest.raises(RunError, match=r"\(model max_tokens: there 256, asked 128\)"):
        run(docs, minilm, limit=5, max_tokens=128)


def test_damaged_weights_are_told(docs, minilm, tmp_path):
    """Weights that only a worker can find damaged end the run with the reason."""
    folder = broken_model(minilm, tmp_path, "model.safetensors")
    with open(f"{minilm}/model.safetensors", "rb") as file:
        (tmp_path / "model" / "model.safetensors").write_bytes(file.read()[:1_000_000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        run_here(docs, folder)


def test_no_store_behind_the_endpoint_is_told(docs, minilm, monkeypatch):
    """A wrong endpoint is an error within seconds, not a storm of retries."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    use({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"} | keys, monkeypatch)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        run(docs, minilm, output="s3://bucket/out")
    assert time.monotonic() - began < 10


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_the_run_goes_on_after(docs, minilm, tmp_path):
    """A full disk ends the run in one sentence; given space, the same command finishes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(StorageError, match="disk is full"):
            run_here(docs, minilm, output=str(disk / "out"), shard_rows=100)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        run_here(docs, minilm, output=str(disk / "out"), shard_rows=100)
        assert len(rows(disk / "out")) == 300
        assert not [name for name in os.listdir(disk / "out") if name.startswith(".")]
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_every_error_is_one_sentence():
    """What reaches the user is a ShoalError with an exit code of its own."""
    assert {e.exit_code for e in (InputError, ModelError, RunError, StorageError, ShoalError)} == {1}
    assert UsageError.exit_code == 2


def test_a_dry_run_of_nothing_is_refused_as_the_run(tmp_path, minilm):
    """A dry run over files without rows says what the run would, before a cluster is looked for."""
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}).slice(0, 0), tmp_path / "a.parquet")

    with pytest.raises(InputError, match="has no rows"):
        dry_run(config(tmp_path / "a.parquet", minilm, gpus_per_worker=9.0))


def test_a_model_that_fails_in_an_int8_sample_is_told(docs, minilm, monkeypatch):
    """In this process as on a cluster: a model that cannot compute the sample of int8 ends with its reason."""

    def broken(*_, **__):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("lib.models.encoder.Encoder.encode", broken)
    with pytest.raises(RunError, match="the sample failed: RuntimeError: no memory left"):
        run_here(docs, minilm, output_dtype="int8")

"""Bad rows and bad files are kept with a reason; a transient error never counts as damage."""

import gzip
import json
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.corpus import CorpusOptions, list_files, measure
from lib.data.reader import read_rows
from lib.data.shards import cut_shards, shards
from lib.errors import InputError
from tests.support.files import ROWS, everything, write_parquet


@pytest.mark.parametrize("header", ["Größe,text\n".encode("latin-1"), "größe,text\n".encode("utf-16")])
def test_a_header_in_another_encoding_is_kept_with_a_reason(tmp_path, header):
    """A CSV whose header is not UTF-8 is one row with a reason; the other files are read."""
    (tmp_path / "a.csv").write_bytes(header + b"1,fish\n")
    write_parquet(tmp_path / "b.parquet")
    _, tables = everything(tmp_path)
    table = pa.concat_tables(tables)

    assert len(table) == 1001
    assert table["_error"].null_count == 1000


def test_damage_is_kept_with_a_reason(tmp_path):
    """Bad lines, wrong encodings, short records and unreadable files are rows with a reason; good rows are untouched."""
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text": \n[1]\n{"text": "caf\xe9"}\n\n{"text": "also good"}\n'
    )
    (tmp_path / "b.csv").write_bytes(b"id,text\n1,good\n2\n3,caf\xe9\n4,x,y\n")
    (tmp_path / "c.txt").write_bytes(b"good\ncaf\xe9\n")
    write_parquet(tmp_path / "d.parquet")
    whole = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    (tmp_path / "f.parquet").write_bytes(b"")

    _, tables = everything(tmp_path)

    rows = pa.concat_tables(tables).to_pylist()
    errors = {row["_source"]: row["_error"] for row in rows if row["_error"]}
    assert [row["text"] for row in rows if not row["_error"]] == ["good", "also good", "good", "good"]
    assert len(errors) == 3 + 3 + 1 + 1 + 1
    for words in ("not JSON", "not a JSON object", "not UTF-8", "fields", "unreadable file"):
        assert any(words in reason for reason in errors.values()), words


def test_a_damaged_row_group_keeps_its_rows(tmp_path):
    """Wrong bytes inside a Parquet file cost the rows of their row group, each kept with a reason, and no other row."""
    pq.write_table(
        pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=250, compression="gzip", use_dictionary=False
    )
    path = tmp_path / "a.parquet"
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[place + 200 : place + 240] = b"\0" * 40
    path.write_bytes(bytes(data))

    _, tables = everything(tmp_path, 1000)

    rows = pa.concat_tables(tables)
    assert len(rows) == 1000
    bad = [i for i, reason in enumerate(rows["_error"].to_pylist()) if reason]
    assert bad == list(range(250, 500))
    assert rows["text"][500].as_py() == ROWS[500]["text"]


def test_an_open_quote_has_a_reason(tmp_path):
    """A quote that is never closed swallows the rest of its CSV file: that record has a reason."""
    (tmp_path / "a.csv").write_text('id,text\n1,good\n2,"open\n3,lost\n')

    rows = pa.concat_tables(everything(tmp_path)[1]).to_pylist()

    assert [row["_error"] is None for row in rows] == [True, False]
    assert "never closed" in rows[1]["_error"]
    assert rows[0]["text"] == "good"


def test_a_long_first_line_and_a_huge_integer(tmp_path):
    """A first line of 5 MB is measured whole; an integer of thousands of digits is a bad row, not a crash."""
    long = "x" * 5_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}) + '\n{"text": "b", "n": ' + "1" * 5000 + "}\n")

    rows = pa.concat_tables(everything(tmp_path)[1]).to_pylist()

    assert [len(row["text"] or "") for row in rows] == [5_000_000, 0]
    assert "not JSON" in rows[1]["_error"]


def test_files_that_disagree_on_a_type(tmp_path):
    """A column of nulls sets no type; numbers in one file and text in another are text."""
    pq.write_table(pa.table({"text": pa.nulls(2), "n": pa.array([1, 2], pa.int64())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b", "c", "d"], "n": ["1", "2", "x"]}), tmp_path / "b.parquet")

    rows = pa.concat_tables(everything(tmp_path, keep_columns=("n",))[1]).to_pylist()

    assert [row["text"] for row in rows] == [None, None, "b", "c", "d"]
    assert [row["n"] for row in rows] == ["1", "2", "1", "2", "x"]
    assert {row["_error"] for row in rows} == {None}


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), ConnectionResetError(104, "reset"), OSError(5, "I/O error")]
)
def test_a_failing_disk_or_network_makes_no_bad_rows(tmp_path, monkeypatch, error):
    """A transient error never counts as damage: measuring and reading raise it, so that no row is lost for good."""
    write_parquet(tmp_path / "a.parquet")
    options = CorpusOptions(input=str(tmp_path))
    corpus = measure(list_files(options, {}), options, {}, False)
    (shard,) = shards(cut_shards(corpus, 1000))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(OSError, match=str(error.args[-1])):
        read_rows(shard, ["text"], corpus.schema, {})
    monkeypatch.setattr("lib.data.formats.parquet.open_file", fail)
    with pytest.raises(InputError, match="cannot read"):
        measure(list_files(options, {}), options, {}, False)


def test_strict_stops_at_an_unreadable_file(tmp_path):
    """With --strict an unreadable file ends the plan, with its name and the reason."""
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(zlib.compress(b"no parquet"))
    options = CorpusOptions(input=str(tmp_path))

    with pytest.raises(InputError, match=r"b\.parquet"):
        measure(list_files(options, {}), options, {}, strict=True)

"""Files to shards to rows: every row once, in order, whatever the format, the cut and the damage."""

import csv
import gzip
import json
import subprocess
import sys
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.corpus import (
    CorpusOptions,
    first_rows,
    list_files,
    measure_files,
    wanted_columns,
)
from lib.errors import InputError, UsageError
from lib.plan import changed_files, cut, shards
from lib.rows import read
from lib.texts import parse_template

ROWS = [{"id": str(i), "text": f"text {i} " + "x" * (i % 50)} for i in range(1000)]


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=170)


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_zst(path):
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)


def write_tsv(path):
    path.write_text("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ROWS))


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(row | {"text": row["text"] + '\n"quoted", line'} for row in ROWS)


def write_text(path):
    path.write_text("".join(row["text"] + "\n" for row in ROWS))


WRITERS = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.txt": write_text,
}


def everything(folder, shard_rows=100, **options):
    """(options, plan, one table a shard)."""
    options = CorpusOptions(input=str(folder), **options)
    corpus = measure_files(list_files(options, {}), options, {}, strict=False)
    if options.limit:
        corpus = first_rows(corpus, options.limit, {})
    plan = cut(corpus, shard_rows)
    return plan, [read(shard, wanted_columns(options), corpus.schema, {}) for shard in shards(plan)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("shard_rows", [7, 100, 10_000])
def test_every_row_once_and_in_order(tmp_path, name, shard_rows):
    """However a file is cut, its rows come once each, in order, with names of their own."""
    WRITERS[name](tmp_path / name)

    _, tables = everything(tmp_path, shard_rows)

    rows = pa.concat_tables(tables)
    assert [text.split("\n")[0] for text in rows["text"].to_pylist()] == [row["text"] for row in ROWS]
    assert len(set(rows["_source"].to_pylist())) == len(ROWS)
    assert rows["_error"].null_count == len(ROWS)
    assert len(tables) >= len(ROWS) / shard_rows / 2


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit", [1, 99, 100, 101, 5000])
def test_limit_is_exact(tmp_path, name, limit):
    """--limit N takes the first N rows, no more and no fewer, of line files too."""
    WRITERS[name](tmp_path / name)

    _, tables = everything(tmp_path, 40, limit=limit)

    assert sum(len(table) for table in tables) == min(limit, len(ROWS))


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.text(max_size=30), max_size=40), shard_rows=st.integers(1, 20), end=st.booleans())
def test_byte_ranges_lose_no_line(tmp_path_factory, lines, shard_rows, end):
    """A plain line file cut anywhere gives its lines once each, whatever they hold, with or without a last line end."""
    folder = tmp_path_factory.mktemp("lines")
    data = "\n".join(json.dumps({"text": line}) for line in lines) + ("\n" if end else "")
    (folder / "a.jsonl").write_text(data)
    if not lines:
        return

    _, tables = everything(folder, shard_rows)

    got = pa.concat_tables(tables)["text"].to_pylist()
    assert got == [line.encode("utf-8", "replace").decode() for line in lines]


def test_values_reach_the_output_exactly(tmp_path):
    """'00123' stays '00123' and a date stays a string; what is no string comes as its JSON text."""
    (tmp_path / "a.jsonl").write_text('{"id": "00123", "text": "2024-01-01", "n": 5, "l": [1, "a"], "z": null}\n')

    _, (table,) = everything(tmp_path, id_column="id", keep_columns=("n", "l", "z"))

    row = table.to_pylist()[0]
    assert (row["id"], row["text"], row["n"], row["l"], row["z"]) == ("00123", "2024-01-01", "5", '[1, "a"]', None)


def test_hive_folders_are_columns(tmp_path):
    """year=2020/ folders give a column `year`."""
    for year in (2020, 2021):
        (tmp_path / f"year={year}").mkdir()
        write_parquet(tmp_path / f"year={year}" / "a.parquet")

    _, tables = everything(tmp_path, 400, keep_columns=("year",))

    years = pa.concat_tables(tables)["year"].to_pylist()
    assert years == ["2020"] * 1000 + ["2021"] * 1000


def test_a_glob_and_a_single_file(tmp_path):
    """--input takes a file or a glob; hidden files of a folder are no corpus."""
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "_b.parquet")
    write_jsonl(tmp_path / "c.jsonl")

    assert sum(map(len, everything(tmp_path)[1])) == 2000
    assert sum(map(len, everything(tmp_path / "*.parquet")[1])) == 1000
    assert sum(map(len, everything(tmp_path / "a.parquet")[1])) == 1000


@pytest.mark.parametrize("header", ["Größe,text\n".encode("latin-1"), "größe,text\n".encode("utf-16")])
def test_a_header_in_another_encoding_is_kept_with_a_reason(tmp_path, header):
    """A CSV whose header is not UTF-8 is one row with a reason; the other files are read."""
    (tmp_path / "a.csv").write_bytes(header + b"1,fish\n")
    write_parquet(tmp_path / "b.parquet")
    _, tables = everything(tmp_path)
    table = pa.concat_tables(tables)

    assert len(table) == 1001
    assert table["_error"].null_count == 1000


def test_tiny_files_share_shards(tmp_path):
    """10,000 files of one row become some shards, not 10,000, and keep every row."""
    for i in range(10_000):
        (tmp_path / f"{i:05d}.txt").write_text(f"document {i}\n")

    plan, tables = everything(tmp_path, 1000)

    assert plan["shard"][-1].as_py() + 1 <= 12
    assert pa.concat_tables(tables)["text"].to_pylist() == [f"document {i}" for i in range(10_000)]


def test_a_long_row_group_is_cut_in_flat_memory(tmp_path):
    """A row group of 2 million rows is cut by rows, and reading a late shard of it does not hold the row group."""
    texts = pa.array([f"{i:07d} " + "long enough to weigh " * 5 for i in range(2_000_000)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2_000_000, use_dictionary=False)
    program = f"""
import resource, sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from lib.corpus import *
from lib.plan import *
from lib.rows import read
options = CorpusOptions(input={str(tmp_path)!r})
corpus = measure_files(list_files(options, {{}}), options, {{}}, False)
plan = cut(corpus, 50_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(shard,) = shards(plan, [39])
table = read(shard, ["text"], corpus.schema, {{}})
print(len(set(plan["shard"].to_pylist())), len(table), table["text"][0].as_py()[:7])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, grown = done.stdout.splitlines()

    assert said == "40 50000 1950000"
    assert float(grown) < 150, f"grew by {grown} MiB; the row group has 230"


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
    """Bytes gone wrong inside a Parquet file cost the rows they held, each kept with a reason, and no other."""
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


def test_an_open_quote_is_told(tmp_path):
    """A CSV quote that is never closed swallows the rest of its file: that record has a reason. TSV has no quotes."""
    (tmp_path / "a.csv").write_text('id,text\n1,good\n2,"open\n3,lost\n')
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"Hello\n2\tworld"\n')

    rows = pa.concat_tables(everything(tmp_path)[1]).to_pylist()

    assert [row["_error"] is None for row in rows] == [True, False, True, True]
    assert "never closed" in rows[1]["_error"]
    assert [row["text"] for row in rows[2:]] == ['"Hello', 'world"']


def test_a_long_first_line_and_a_huge_integer(tmp_path):
    """A first line of 5 MB is measured whole; an integer of thousands of digits is a bad row, not a crash."""
    long = "x" * 5_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}) + '\n{"text": "b", "n": ' + "1" * 5000 + "}\n")

    rows = pa.concat_tables(everything(tmp_path)[1]).to_pylist()

    assert [len(row["text"] or "") for row in rows] == [5_000_000, 0]
    assert "not JSON" in rows[1]["_error"]


def test_files_that_disagree_on_a_type(tmp_path):
    """A column of nulls sets no type; a value that does not fit the first file's type is null with a reason, alone."""
    pq.write_table(pa.table({"text": pa.nulls(2), "n": pa.array([1, 2], pa.int64())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b", "c", "d"], "n": ["1", "2", "x"]}), tmp_path / "b.parquet")

    rows = pa.concat_tables(everything(tmp_path, keep_columns=("n",))[1]).to_pylist()

    assert [row["text"] for row in rows] == [None, None, "b", "c", "d"]
    assert [row["n"] for row in rows] == [1, 2, 1, 2, None]
    assert [row["_error"] for row in rows] == [None] * 4 + ["column 'n' is not int64"]


def test_names_of_rows_tell_folders_apart(tmp_path):
    """Files of one name in two folders give their rows different names."""
    for year in (2020, 2021):
        (tmp_path / "in" / f"year={year}").mkdir(parents=True)
        write_text(tmp_path / "in" / f"year={year}" / "a.txt")

    for asked in (tmp_path / "in", tmp_path / "in" / "year=*"):
        names = pa.concat_tables(everything(asked)[1])["_source"].to_pylist()
        assert len(set(names)) == 2000
        assert names[0] == "year=2020/a.txt#0"


def test_an_id_that_not_every_file_has_names_no_row(tmp_path):
    """Unasked, a column `id` is used only where every file has one."""
    write_parquet(tmp_path / "a.parquet")
    options = CorpusOptions(input=str(tmp_path))
    assert measure_files(list_files(options, {}), options, {}, False).id_column == "id"
    write_text(tmp_path / "b.txt")
    assert measure_files(list_files(options, {}), options, {}, False).id_column is None


def test_an_id_may_be_part_of_the_text(tmp_path):
    """A text made of the id is read where lines of some file have none, and those rows have no such words."""
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS))
    options = CorpusOptions(input=str(tmp_path), text_template="{id} {text}")
    corpus = measure_files(list_files(options, {}), options, {}, False)
    tables = [read(shard, ["id", "text"], corpus.schema, {}) for shard in shards(cut(corpus, 500))]

    assert sum(map(len, tables)) == 2000
    assert pa.concat_tables(tables)["_error"].null_count == 2000


def test_a_column_that_is_no_text_is_told(tmp_path):
    """A list or struct as text is an error in the driver."""
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="not text"):
        everything(tmp_path)


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), ConnectionResetError(104, "reset"), OSError(5, "I/O error")]
)
def test_a_failing_disk_or_network_makes_no_bad_rows(tmp_path, monkeypatch, error):
    """What may pass is never taken for damage: measuring and reading raise, so that nothing is lost for good."""
    write_parquet(tmp_path / "a.parquet")
    options = CorpusOptions(input=str(tmp_path))
    corpus = measure_files(list_files(options, {}), options, {}, False)
    (shard,) = shards(cut(corpus, 1000))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(OSError, match=str(error.args[-1])):
        read(shard, ["text"], corpus.schema, {})
    monkeypatch.setattr("lib.formats.parquet.open_file", fail)
    with pytest.raises(InputError, match="cannot read"):
        measure_files(list_files(options, {}), options, {}, False)


def test_columns_are_named(tmp_path):
    """A missing column is an error in the driver that names the columns there are."""
    write_parquet(tmp_path / "a.parquet")

    with pytest.raises(InputError, match=r"no column 'body' in .*a\.parquet\. Columns there: id, text"):
        everything(tmp_path, text_column="body")


def test_a_changed_file_is_named(tmp_path):
    """A file that is not what was planned is named, and its shards refuse to read it."""
    write_jsonl(tmp_path / "a.jsonl")
    options = CorpusOptions(input=str(tmp_path))
    corpus = measure_files(list_files(options, {}), options, {}, False)
    plan = cut(corpus, 100)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')

    assert "a.jsonl has changed" in changed_files(plan, list_files(options, {}))[0]
    with pytest.raises(InputError, match="has changed since the plan"):
        read(next(shards(plan)), ["text"], corpus.schema, {})


def test_the_plan_depends_on_the_files_alone(tmp_path):
    """Planned twice, the same files give the same shards, to the letter."""
    for name, write in WRITERS.items():
        write(tmp_path / name)
    first, second = everything(tmp_path, 77)[0], everything(tmp_path, 77)[0]

    assert first.equals(second)
    assert [s.key for s in shards(first)] == [s.key for s in shards(second)]
    assert len({s.key for s in shards(first)}) == first["shard"][-1].as_py() + 1


@pytest.mark.parametrize("template", ["{", "{}", "plain", "{a!r}", "{a:>5}"])
def test_a_wrong_template_is_told(template):
    """A template is literal text and bare column names."""
    with pytest.raises(UsageError, match="--text-template"):
        parse_template(template)


def test_strict_stops_at_an_unreadable_file(tmp_path):
    """With --strict an unreadable file ends the plan, with its name and the reason."""
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(zlib.compress(b"no parquet"))
    options = CorpusOptions(input=str(tmp_path))

    with pytest.raises(InputError, match=r"b\.parquet"):
        measure_files(list_files(options, {}), options, {}, strict=True)

"""Files to shards to rows: every row once, in order, whatever the format and the cut."""

import json
import subprocess
import sys

import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.corpus import CorpusOptions, list_files, measure
from lib.data.formats import format_of, known_suffixes
from lib.data.reader import read_rows
from lib.data.shards import changed_files, cut_shards, shards
from lib.data.texts import parse_template
from lib.errors import InputError, UsageError
from tests.support.files import ROWS, WRITERS, everything, write_jsonl, write_parquet, write_text


def test_every_format_is_tested():
    """The files of the tests below are of every format: a new one needs a writer in tests/support/files.py."""
    tested = {format_of(name) for name in WRITERS}

    assert [suffix for suffix in known_suffixes().split() if format_of(f"a{suffix}") not in tested] == []


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


def test_a_file_without_a_usable_line_takes_no_id_away(tmp_path):
    """Ids stay those of the column where another file has no line that can be read; its lines are errors."""
    (tmp_path / "good.jsonl").write_text('{"id": "doc-1", "text": "a"}\n{"id": "doc-2", "text": "b"}\n')
    (tmp_path / "notes.json").write_text("[\n]\n")
    options = CorpusOptions(input=str(tmp_path))
    corpus = measure(list_files(options, {}), options, {}, strict=False)
    rows = pa.concat_tables(everything(tmp_path, id_column="id")[1])

    assert corpus.id_column == "id"
    assert rows["id"].to_pylist() == ["doc-1", "doc-2", None, None]
    assert rows["_error"].is_null().to_pylist() == [True, True, False, False]


def test_numbers_of_json_stay_as_they_stand(tmp_path):
    """No number is rounded or written otherwise: two different ids never become one."""
    numbers = [
        "1.10",
        "0.1234567890123456789",
        "0.12345678901234568",
        "1e400",
        "1E5",
        "-0",
        "0",
        "12345678901234567890123",
        "NaN",
    ]
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"id": {n}, "text": "t", "deep": [{n}, {{"k": {n}}}]}}\n' for n in numbers)
    )
    rows = pa.concat_tables(everything(tmp_path, id_column="id", keep_columns=("deep",))[1])

    assert rows["id"].to_pylist() == numbers
    assert rows["deep"].to_pylist() == [f'[{n}, {{"k": {n}}}]' for n in numbers]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.tsv.gz", "\t")])
@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\0\r", codec="utf-8"), min_size=1), min_size=1, max_size=20
    )
)
def test_what_pandas_writes_is_read(tmp_path_factory, name, delimiter, texts):
    """Values with delimiters, quotes and line ends, in CSV and in TSV, are those that pandas wrote."""
    folder = tmp_path_factory.mktemp("pandas")
    pandas.DataFrame({"n": range(len(texts)), "text": texts}).to_csv(folder / name, sep=delimiter, index=False)

    assert pa.concat_tables(everything(folder, 7)[1])["text"].to_pylist() == texts


def test_a_glob_and_a_single_file(tmp_path):
    """--input takes a file or a glob; hidden files of a folder are no corpus."""
    write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "_b.parquet")
    write_jsonl(tmp_path / "c.jsonl")

    assert sum(map(len, everything(tmp_path)[1])) == 2000
    assert sum(map(len, everything(tmp_path / "*.parquet")[1])) == 1000
    assert sum(map(len, everything(tmp_path / "a.parquet")[1])) == 1000


def test_tiny_files_share_shards(tmp_path):
    """10,000 files of one row become some shards, not 10,000, and keep every row."""
    for i in range(10_000):
        (tmp_path / f"{i:05d}.txt").write_text(f"document {i}\n")

    plan, tables = everything(tmp_path, 1000)

    assert plan["shard"][-1].as_py() + 1 <= 12
    assert pa.concat_tables(tables)["text"].to_pylist() == [f"document {i}" for i in range(10_000)]


def test_a_long_row_group_is_cut_in_flat_memory(tmp_path):
    """A row group of 2 million rows is cut by rows, and reading a late shard of it does not need the memory of the row group."""
    numbers = pc.utf8_lpad(pa.array(range(2_000_000)).cast(pa.string()), 7, "0")
    texts = pc.binary_join_element_wise(numbers, "long enough to weigh " * 5, " ")
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2_000_000, use_dictionary=False)
    program = f"""
import resource, sys
from lib.data.corpus import *
from lib.data.shards import *
from lib.data.reader import read_rows
options = CorpusOptions(input={str(tmp_path)!r})
corpus = measure(list_files(options, {{}}), options, {{}}, False)
plan = cut_shards(corpus, 50_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(shard,) = shards(plan, [39])
table = read_rows(shard, ["text"], corpus.schema, {{}})
print(len(set(plan["shard"].to_pylist())), len(table), table["text"][0].as_py()[:7])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    counts, grown = done.stdout.splitlines()

    assert counts == "40 50000 1950000"
    assert float(grown) < 150, f"grew by {grown} MiB; the row group has 230"


def test_names_of_rows_tell_folders_apart(tmp_path):
    """Files of one name in two folders give their rows different names."""
    for year in (2020, 2021):
        (tmp_path / "in" / f"year={year}").mkdir(parents=True)
        write_text(tmp_path / "in" / f"year={year}" / "a.txt")

    for url in (tmp_path / "in", tmp_path / "in" / "year=*"):
        names = pa.concat_tables(everything(url)[1])["_source"].to_pylist()
        assert len(set(names)) == 2000
        assert names[0] == "year=2020/a.txt#0"


def test_an_id_that_not_every_file_has_names_no_row(tmp_path):
    """Without --id-column a column `id` is used only where every file has one."""
    write_parquet(tmp_path / "a.parquet")
    options = CorpusOptions(input=str(tmp_path))
    assert measure(list_files(options, {}), options, {}, False).id_column == "id"
    write_text(tmp_path / "b.txt")
    assert measure(list_files(options, {}), options, {}, False).id_column is None


def test_an_id_may_be_part_of_the_text(tmp_path):
    """A text made of the id is read where lines of some file have none, and those rows have no such words."""
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS))
    options = CorpusOptions(input=str(tmp_path), text_template="{id} {text}")
    corpus = measure(list_files(options, {}), options, {}, False)
    tables = [read_rows(shard, ["id", "text"], corpus.schema, {}) for shard in shards(cut_shards(corpus, 500))]

    assert sum(map(len, tables)) == 2000
    assert pa.concat_tables(tables)["_error"].null_count == 2000


def test_a_column_that_is_no_text_is_refused(tmp_path):
    """A list or struct as text is an error in the driver."""
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="not text"):
        everything(tmp_path)


def test_a_missing_column_is_refused(tmp_path):
    """A missing column is an error in the driver that names the columns of the file."""
    write_parquet(tmp_path / "a.parquet")

    with pytest.raises(InputError, match=r"no column 'body' in .*a\.parquet\. Columns there: id, text"):
        everything(tmp_path, text_column="body")


def test_a_changed_file_is_named(tmp_path):
    """A file that has changed since the plan is named, and reading its shards is an error."""
    write_jsonl(tmp_path / "a.jsonl")
    options = CorpusOptions(input=str(tmp_path))
    corpus = measure(list_files(options, {}), options, {}, False)
    plan = cut_shards(corpus, 100)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')

    assert "a.jsonl has changed" in changed_files(plan, list_files(options, {}))[0]
    with pytest.raises(InputError, match="has changed since the plan"):
        read_rows(next(shards(plan)), ["text"], corpus.schema, {})


def test_the_plan_depends_on_the_files_alone(tmp_path):
    """Planned twice, the same files give the same shards, to the letter."""
    for name, write in WRITERS.items():
        write(tmp_path / name)
    first, second = everything(tmp_path, 77)[0], everything(tmp_path, 77)[0]

    assert first.equals(second)
    assert [s.key for s in shards(first)] == [s.key for s in shards(second)]
    assert len({s.key for s in shards(first)}) == first["shard"][-1].as_py() + 1


@pytest.mark.parametrize("template", ["{", "{}", "plain", "{a!r}", "{a:>5}"])
def test_a_wrong_template_is_refused(template):
    """A template is literal text and bare column names."""
    with pytest.raises(UsageError, match="--text-template"):
        parse_template(template)

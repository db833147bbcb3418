"""The columns of a corpus: of hive folders, of files with other types, of lines far down in a file."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.columns import holds
from lib.data.formats import jsonl
from lib.errors import InputError
from tests.support.files import everything, write_parquet


def test_hive_folders_are_columns(tmp_path):
    """year=2020/ folders give a column `year`."""
    for year in (2020, 2021):
        (tmp_path / f"year={year}").mkdir()
        write_parquet(tmp_path / f"year={year}" / "a.parquet")

    _, tables = everything(tmp_path, 400, keep_columns=("year",))

    years = pa.concat_tables(tables)["year"].to_pylist()
    assert years == ["2020"] * 1000 + ["2021"] * 1000


def test_folders_above_the_input_and_columns_of_a_file_s_own(tmp_path):
    """A folder above the input gives no column, nor one with the name of a column that the file, or the line, has."""
    inner = tmp_path / "id=7" / "text=t"
    inner.mkdir(parents=True)
    (inner / "a.jsonl").write_text('{"id": "one", "text": "own"}\n{"text": "without an id"}\n')
    pq.write_table(pa.table({"id": ["two", None], "text": ["x", "y"]}), inner / "b.parquet")
    (inner / "c.csv").write_text("id,text\nthree,z\n")

    from_above = pa.concat_tables(everything(inner, id_column="id")[1]).to_pylist()
    from_top = pa.concat_tables(everything(tmp_path, id_column="id")[1]).to_pylist()

    assert [row["id"] for row in from_above] == ["one", None, "two", None, "three"]
    assert [row["id"] for row in from_top] == ["one", "7", "two", None, "three"]
    assert [row["text"] for row in from_top] == ["own", "without an id", "x", "y", "z"]


@pytest.mark.parametrize(
    ("folder", "value"),
    [("lang=__HIVE_DEFAULT_PARTITION__", None), ("lang=a%2Fb%3Dc", "a/b=c"), ("la%6Eg=%E4%B8%AD", "中"), ("lang=", "")],
)
def test_values_of_hive_folders(tmp_path, folder, value):
    """Percent-encoded values are decoded, and Hive's null is null, as pyarrow and Spark read them."""
    (tmp_path / folder).mkdir()
    write_parquet(tmp_path / folder / "a.parquet")

    (table,) = everything(tmp_path, 2000, text_column="lang")[1]

    assert table["lang"].to_pylist() == [value] * 1000


def columns_of(folder, *tables, **options):
    """The rows of files with these columns, in order, and their schema."""
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet")
    return pa.concat_tables(everything(folder, **options)[1])


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.int64(), pa.int32(), pa.int64()),
        (pa.int64(), pa.float64(), pa.float64()),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.null(), pa.int16(), pa.int16()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string(), pa.int64(), pa.large_string()),
        (pa.uint64(), pa.int64(), pa.large_string()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
        (pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("ns")),
        (pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.int64())),
    ],
)
def test_files_of_other_types_have_the_wider_one(tmp_path, one, other, together):
    """A column has a type that holds the values of every file, whichever comes first, and no value of it is lost."""
    values = (
        [None] if pa.types.is_null(one) else [[7]] if pa.types.is_list(one) else ["7" if "string" in str(one) else 7]
    )
    others = [[8]] if pa.types.is_list(other) else ["8" if "string" in str(other) else 8]
    tables = [pa.table({"text": ["a"], "k": pa.array(v, t)}) for v, t in ((values, one), (others, other))]
    rows = columns_of(tmp_path, *tables, keep_columns=("k",))

    assert rows.schema.field("k").type == together
    assert rows["_error"].null_count == 2
    assert rows["k"].to_pylist() == [each for table in tables for each in table["k"].cast(together).to_pylist()]


def test_types_without_a_common_one_are_refused(tmp_path):
    """Both files and types are named; a column that is not read may be as it likes."""
    tables = [pa.table({"text": ["a"], "k": pa.array(values)}) for values in ([[1, 2]], [7])]
    assert columns_of(tmp_path, *tables).num_rows == 2
    with pytest.raises(InputError, match=r"column 'k' is list.*0\.parquet and int64 in .*1\.parquet"):
        columns_of(tmp_path, *tables, keep_columns=("k",))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
@pytest.mark.parametrize("repeated", ["text", "id"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, name, repeated):
    """Two columns of one name, of which nobody knows which is meant, are refused before anything is read; others may be."""
    columns = ["id", "text", repeated, "other", "other"]
    if name == "a.csv":
        (tmp_path / name).write_text(",".join(columns) + "\n1,2,3,4,5\n")
    else:
        pq.write_table(pa.table([pa.array(["x"])] * 5, names=columns), tmp_path / name)

    with pytest.raises(InputError, match=f"2 columns named '{repeated}'"):
        everything(tmp_path)


def test_a_column_that_comes_late(tmp_path):
    """A column of JSON Lines that the beginning of the file lacks is there: rows before it have null. One that no line has is
    refused, though its name stands in a text."""
    lines = [json.dumps({"id": i, "text": 'say "nothing": ' + "long " * 30}) for i in range(9000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps({"id": 9000, "text": "t", "läbel": 1.50})]) + "\n")
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"1.5}", b"1.50}"))

    rows = pa.concat_tables(everything(tmp_path, 4000, keep_columns=("läbel",))[1])

    assert rows["läbel"].to_pylist() == [None] * 9000 + ["1.50"]
    assert rows["_error"].null_count == 9001
    with pytest.raises(InputError, match="no column 'nothing'"):
        everything(tmp_path, keep_columns=("nothing",))


def test_folders_above_plain_text(tmp_path):
    """A hive folder's column of text files is the folder's value, not the line."""
    (tmp_path / "year=2020").mkdir()
    (tmp_path / "year=2020" / "a.txt").write_text("hello\nworld\n")

    (table,) = everything(tmp_path, text_column="text", keep_columns=("year",))[1]

    assert table.select(["text", "year"]).to_pydict() == {"text": ["hello", "world"], "year": ["2020", "2020"]}


def test_a_late_column_beside_a_damaged_file_and_whole_samples(tmp_path, monkeypatch):
    """Only readable files that a sample does not hold whole are read for a column; a damaged one is a row with a reason."""
    lines = [json.dumps({"id": str(i), "text": "word " * 100}) for i in range(3000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"id": "last", "text": "x", "label": "late"}']))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    (tmp_path / "c.jsonl").write_text('{"id": "c", "text": "small"}\n')
    looked_at = []
    has_column = jsonl.has_column
    monkeypatch.setattr(jsonl, "has_column", lambda path, *rest: looked_at.append(path[-8:]) or has_column(path, *rest))

    rows = pa.concat_tables(everything(tmp_path, keep_columns=("label",))[1]).to_pylist()

    assert [row["label"] for row in rows if row["label"]] == ["late"]
    assert [row["_source"] for row in rows if row["_error"]][-1].startswith("b.jsonl.gz")
    assert looked_at == ["/a.jsonl"]


@pytest.mark.parametrize("text", ["[" * 700 + "]" * 700, '{"a":' * 700 + "1" + "}" * 700])
def test_json_of_many_levels_is_a_bad_row(tmp_path, text):
    """A value nested deeper than Python follows costs its own row, or is kept; never the file."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{{"text": {text}}}\n{{"text": "too"}}\n')

    rows = pa.concat_tables(everything(tmp_path, text_column="text")[1]).to_pylist()

    assert [rows[0]["text"], rows[2]["text"]] == ["good", "too"]
    assert rows[1]["_error"] == "JSON of too many levels" or rows[1]["text"].replace(" ", "") == text


@pytest.mark.parametrize(
    ("kind", "other", "fits"),
    [
        (pa.list_(pa.float32()), pa.large_list(pa.float32()), True),
        (pa.list_(pa.float32(), 4), pa.list_(pa.field("item", pa.float32(), nullable=False)), True),
        (pa.list_(pa.float32()), pa.list_(pa.float64()), False),
        (pa.large_string(), pa.binary(16), False),
    ],
)
def test_types_that_a_planned_column_holds(kind, other, fits):
    """Lists of any sort hold one another where their values do; text does not hold bytes."""
    assert holds(kind, other) is fits


@pytest.mark.parametrize("end", ["", "\n"])
def test_quotes_of_a_tsv_that_are_letters(tmp_path, end):
    """A quote inside or before a word, or one that is never closed, takes no row away; quoted values are unquoted."""
    lines = ['"Some quote" he said', '"unbalanced', "fine", 'end" of', '"a ""q"" b"', 'in"side', '"open', "last"]
    body = "\n".join(f"{number}\t{line}" for number, line in enumerate(lines))
    (tmp_path / "a.tsv").write_text(f"id\ttext\n{body}{end}")

    rows = pa.concat_tables(everything(tmp_path, text_column="text")[1]).to_pylist()

    assert [row["text"] for row in rows] == [*lines[:4], 'a "q" b', *lines[5:]]
    assert [row["_error"] for row in rows] == [None] * len(lines)

"""Exports have the input's vectors, each once, in the form that other stores take."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import RunError, UsageError
from lib.index import build_job
from lib.index.build.config import open_index_build
from lib.index.build.segments_job import encode
from lib.index.export.job import export
from lib.index.export.mappers import lance_options, lance_url, metadata
from lib.storage.folder import Folder
from tests.support.indexed import config_of
from tests.support.messages import listen

DIM = 32
NOTHING, NAN = 7, 1300  # rows that have no vector
ROWS = 2000


def made_vectors(rows: int = ROWS) -> np.ndarray:
    """float32 [rows, DIM], in clumps, of lengths that are not 1."""
    random = np.random.default_rng(0)
    middles = random.standard_normal((8, DIM)) * 3
    return (middles[random.integers(0, 8, rows)] + random.standard_normal((rows, DIM))).astype(np.float32)


def write(folder: Path, name: str, rows: range) -> None:
    """A file of the corpus: `id`, `embedding`, `title`, `year`."""
    vectors = made_vectors(max(ROWS, rows.stop))
    vectors[NAN, 3] = np.nan
    column = [None if row == NOTHING else vectors[row].tolist() for row in rows]
    data = {
        "id": pa.array([f"doc{row}" for row in rows]),
        "embedding": pa.array(column, pa.list_(pa.float32(), DIM)),
        "title": pa.array([f"Über {row}" if row % 3 else None for row in rows]),
        "year": pa.array([1900 + row % 100 for row in rows], pa.int32()),
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(data), folder / name)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Three files; rows NOTHING and NAN have no vector."""
    for number, rows in enumerate((range(700), range(700, 1400), range(1400, ROWS))):
        write(tmp_path / "corpus", f"{number}.parquet", rows)
    return tmp_path / "corpus"


@pytest.fixture
def build(corpus, tmp_path):
    """build(**options): build the index or go on with it, then export; the messages. Its folder is tmp_path/index."""

    def run(**options) -> list[str]:
        messages = listen()
        defaults = {"kind": "ivf-flat", "lists": 8, "metric": "l2", "shard_rows": 500, "recall_queries": 10}
        config = config_of(corpus, tmp_path / "index", **(defaults | options))
        build_job.build(config)
        opened = open_index_build(config)
        export(opened, encode(opened))
        return messages

    return run


def good_rows(rows: int = ROWS) -> list[int]:
    return [row for row in range(rows) if row not in (NOTHING, NAN)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: Path) -> pa.Table:
    """Every file of the folder, in the order of their names."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.iterdir()))


def encoded(tmp_path: Path) -> pa.Table:
    """OUTPUT/rows of the rows that have a vector."""
    paths = sorted((tmp_path / "index/rows").glob("part-*.parquet"))
    table = pa.concat_tables(pq.read_table(path) for path in paths)
    return table.filter(table["error"].is_null())


def test_milvus_files_have_ids_and_vectors(build, tmp_path):
    """Its files have the columns `id` (string) and `vector` (list of float32), every row with a vector once, and no other."""
    messages = build(exports=("milvus",), keep_columns=("title",))
    table = read(tmp_path / "index/exports/milvus")

    assert table.schema.equals(pa.schema({"id": pa.string(), "vector": pa.list_(pa.float32())}))
    assert table["id"].to_pylist() == [f"doc{row}" for row in good_rows()]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), made_vectors()[good_rows()])
    assert messages[-1].endswith("1,998 vectors in 5 files; 2 rows without one are left out (rows/ says why)")


def test_pinecone_files_have_ids_values_and_metadata(build, tmp_path):
    """Its files have `id`, `values` and `metadata`, the kept columns as JSON without nulls; vectors are those the index is of."""
    build(exports=("pinecone",), keep_columns=("title", "year"), metric="cosine")
    table = read(tmp_path / "index/exports/pinecone/__default__")
    vectors = made_vectors()[good_rows()]

    assert table.schema.equals(
        pa.schema({"id": pa.string(), "values": pa.list_(pa.float32()), "metadata": pa.string()})
    )
    assert table["id"].to_pylist() == [f"doc{row}" for row in good_rows()]
    np.testing.assert_allclose(
        np.array(table["values"].to_pylist()), vectors / np.linalg.norm(vectors, axis=1)[:, None], atol=1e-6
    )
    wanted = [{"title": f"Über {row}", "year": 1900 + row % 100} for row in good_rows()]
    for row, each in zip(good_rows(), wanted, strict=True):
        if row % 3 == 0:
            del each["title"]
    assert [json.loads(each) for each in table["metadata"].to_pylist()] == wanted


def test_metadata_is_flat():
    """A row's metadata are texts, numbers, bools and lists of texts; other values become their text, nulls and NaN go."""
    row = {"a": True, "b": 2, "c": 0.5, "d": float("nan"), "e": ["x", None, 3], "f": {"g": 1}, "h": None, "i": "ü"}

    assert json.loads(metadata(row) or "") == {
        "a": True,
        "b": 2,
        "c": 0.5,
        "e": ["x", "3"],
        "f": "{'g': 1}",
        "i": "ü",
    }
    assert metadata({"d": float("inf"), "h": None}) is None


def test_import_folders_have_nothing_else(build, tmp_path):
    """Pinecone imports all Parquet below the folder it is given: there is none but the rows', without a column it does not know."""
    build(exports=("pinecone", "milvus"))
    files = bytes_of(tmp_path / "index/exports")

    assert {name.rsplit("/", 1)[0] for name in files} == {"pinecone/__default__", "milvus"}
    assert all(name.rsplit("/", 1)[1].startswith("vectors-") and name.endswith(".parquet") for name in files)
    assert read(tmp_path / "index/exports/pinecone/__default__").column_names == ["id", "values"]
    assert len(files) == 2 * len(list((tmp_path / "index/rows").glob("part-*.parquet")))


def test_a_repeated_shard_is_the_same_file(build, tmp_path):
    """The same command leaves every byte as it was; so does a shard that is done again because its part was lost."""
    build(exports=("milvus", "pinecone", "centroids"), keep_columns=("year",))
    before = bytes_of(tmp_path / "index/exports")
    build(exports=("milvus", "pinecone", "centroids"), keep_columns=("year",))
    assert bytes_of(tmp_path / "index/exports") == before

    for lost in (tmp_path / "index/_stages").glob("export-*"):
        (lost / "_manifest.parquet").unlink()
        next(lost.glob("part-*")).unlink()
    build(exports=("milvus", "pinecone", "centroids"), keep_columns=("year",))
    assert bytes_of(tmp_path / "index/exports") == before


def test_growth_exports_what_is_new(build, corpus, tmp_path):
    """A grown corpus adds files with the new rows alone; the old files stay as they were, and no row is there twice."""
    build(exports=("milvus",))
    before = bytes_of(tmp_path / "index/exports")
    write(corpus, "3.parquet", range(ROWS, ROWS + 300))
    messages = build(exports=("milvus",))
    after = bytes_of(tmp_path / "index/exports")

    assert {name: data for name, data in after.items() if name in before} == before
    assert read(tmp_path / "index/exports/milvus")["id"].to_pylist() == [f"doc{row}" for row in good_rows(ROWS + 300)]
    new = [pq.read_table(tmp_path / "index/exports" / name) for name in sorted(set(after) - set(before))]
    assert pa.concat_tables(new)["id"].to_pylist() == [f"doc{row}" for row in range(ROWS, ROWS + 300)]
    assert "2,298 vectors" in messages[-1]


def test_a_shard_without_vectors_leaves_no_file(build, corpus, tmp_path):
    """Where no row of a shard has a vector there is no file, and nothing is missed."""
    data = {"id": ["x", "y"], "embedding": pa.array([None, None], pa.list_(pa.float32(), DIM))}
    more = {"title": pa.nulls(2, pa.string()), "year": pa.nulls(2, pa.int32())}
    build(exports=("milvus",))
    before = bytes_of(tmp_path / "index/exports")
    pq.write_table(pa.table(data | more), corpus / "9.parquet")

    assert "1,998 vectors in 5 files; 4 rows without one" in build(exports=("milvus",))[-1]
    assert bytes_of(tmp_path / "index/exports") == before


def test_lost_exports_are_reported(build, tmp_path):
    """What was exported and is no longer there is told, with what to delete to have it again; it is never said to be there."""
    build(exports=("milvus",))
    gone = min((tmp_path / "index/exports/milvus").iterdir())
    before = gone.read_bytes()
    gone.unlink()
    with pytest.raises(RunError, match=rf"1 files of .*{gone.name}.*_stages/export-milvus-000000"):
        build(exports=("milvus",))

    shutil.rmtree(next((tmp_path / "index/_stages").glob("export-milvus-*")))
    build(exports=("milvus",))
    assert gone.read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("ivf-flat", "ip"),
        ("ivf-pq:code=8", "l2"),
        ("ivf-opq:code=4", "ip"),
        ("ivf-pq-fastscan", "l2"),
        ("ivf-rabitq:bits=1", "ip"),
    ],
)
def test_centroids_are_those_of_the_lists(kind, metric, build, tmp_path):
    """With the README's arithmetic alone, a vector's nearest centroid is the `list`, its nearest codewords the `code` in rows/."""
    build(exports=("centroids",), kind=kind, metric=metric)
    place = tmp_path / "index/exports/centroids"
    arrays = {path.stem: np.load(path) for path in place.glob("*.npy")}
    rows, points = encoded(tmp_path), made_vectors()[good_rows()].astype(np.float64)
    has_codebooks, rotated = "pq" in kind, "opq" in kind or "rabitq" in kind

    assert {name for name, array in arrays.items() if array.dtype == np.float32} == {
        "centroids",
        *(["codebooks"] if has_codebooks else []),
        *(["rotation"] if rotated else []),
    }
    assert arrays["centroids"].shape == (8, DIM)
    assert ("behind" in (place / "README.md").read_text()) == rotated
    if rotated:
        points = points @ arrays["rotation"].T
    products, lists = points @ arrays["centroids"].T, rows["list"].to_numpy()
    near = products if metric == "ip" else products - np.sum(arrays["centroids"] ** 2, axis=1) / 2
    assert_nearest(near, lists)
    if has_codebooks:
        books, rests = arrays["codebooks"], points - arrays["centroids"][lists]
        for group, code in enumerate(numbers(rows, books.shape[1]).T):
            rest = rests[:, group * books.shape[2] : (group + 1) * books.shape[2]]
            assert_nearest(rest @ books[group].T - np.sum(books[group] ** 2, axis=1) / 2, code)


def assert_nearest(near: np.ndarray, chosen: np.ndarray) -> None:
    """`chosen` ([n]) are the greatest of `near` ([n, choices]), but for what float32 cannot tell apart."""
    best = near.max(axis=1)
    assert (best - near[np.arange(len(near)), chosen] <= 1e-4 * np.abs(near).max()).all()
    assert (near.argmax(axis=1) == chosen).mean() > 0.99


def numbers(rows: pa.Table, words: int) -> np.ndarray:
    """What the codes hold, [n, groups]: bytes, or half bytes of 16 codewords, the lower first."""
    codes = np.frombuffer(b"".join(rows["code"].to_pylist()), np.uint8).reshape(len(rows), -1)
    return codes if words == 256 else np.stack([codes & 15, codes >> 4], axis=2).reshape(len(rows), -1)


def test_impossible_exports_are_refused(build, corpus, tmp_path, monkeypatch):
    """Centroids of a kind without lists, and Lance without pylance, are refused with what to do, and nothing is begun: the
    corrected command has its way."""

    def opened(**options):
        return open_index_build(config_of(corpus, tmp_path / "other", **options))

    with pytest.raises(UsageError, match="flat has no lists"):
        opened(kind="flat", exports=("centroids",))
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[lance\]'"):
        opened(kind="flat", exports=("lance",))
    assert opened(kind="ivf-flat", lists=4, exports=("centroids",)).kind.has_lists


def test_lance_has_the_store_s_options_by_its_own_names(monkeypatch):
    """fsspec's S3 options and the environment's endpoint reach Lance by its names; a local folder is a path without options."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    s3 = {"key": "k", "secret": "s", "endpoint_url": "http://host:9000", "client_kwargs": {"region_name": "here"}}

    assert lance_options(Folder("s3://bucket/a", s3)) == {
        "aws_access_key_id": "k",
        "aws_secret_access_key": "s",
        "aws_region": "here",
        "aws_endpoint": "http://host:9000",
        "allow_http": "true",
    }
    assert lance_url(Folder("s3a://bucket/a", s3)) == "s3://bucket/a"
    assert lance_options(Folder("s3://bucket/a")) == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://host")
    assert lance_options(Folder("s3://bucket/a")) == {"aws_endpoint": "https://host"}
    assert (lance_url(Folder("/a/b")), lance_options(Folder("/a/b"))) == ("/a/b", {})


def test_lance_has_every_row_once(build, corpus, tmp_path):
    """The dataset has ids, kept columns and vectors of fixed size; a repeated command adds no version, a grown corpus its rows."""
    lance = pytest.importorskip("lance")
    options = {"exports": ("lance",), "keep_columns": ("title", "year")}
    build(**options)
    place = tmp_path / "index/exports/vectors.lance"
    table, before = lance.dataset(place).to_table(), bytes_of(place)

    assert table.schema.equals(
        pa.schema({"id": pa.string(), "title": pa.string(), "year": pa.int32(), "vector": pa.list_(pa.float32(), DIM)})
    )
    assert table["id"].to_pylist() == [f"doc{row}" for row in good_rows()]
    assert table["year"].to_pylist() == [1900 + row % 100 for row in good_rows()]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), made_vectors()[good_rows()])

    build(**options)
    assert bytes_of(place) == before

    write(corpus, "3.parquet", range(ROWS, ROWS + 300))
    build(**options)
    assert lance.dataset(place).to_table()["id"].to_pylist() == [f"doc{row}" for row in good_rows(ROWS + 300)]
    after = bytes_of(place)
    assert all(after.get(name) == data for name, data in before.items() if name.startswith("data/"))


def test_a_lost_lance_part_adds_no_row(build, tmp_path):
    """A shard whose part was lost is written again; its first fragment is in no version that follows."""
    lance = pytest.importorskip("lance")
    build(exports=("lance",))
    (stage,) = (tmp_path / "index/_stages").glob("export-lance-*")
    (stage / "_manifest.parquet").unlink()
    next(stage.glob("part-*")).unlink()
    build(exports=("lance",))

    ids = lance.dataset(tmp_path / "index/exports/vectors.lance").to_table()["id"].to_pylist()
    assert ids == [f"doc{row}" for row in good_rows()]

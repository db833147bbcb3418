"""Wrong options and odd vectors: jobs/build_index.py names them before it computes anything."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import InputError, UsageError
from tests.support.indexed import DIM, built, clustered, write, write_many
from tests.support.messages import listen

ROWS, LISTS = 3000, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(ROWS)


@pytest.fixture
def source(tmp_path, vectors):
    return write_many(tmp_path / "vectors", vectors)


def test_rows_of_odd_length_do_not_decide(tmp_path):
    """Of lists of no fixed length the commonest decides; an empty one and a file without any vector are kept out, counted."""
    vectors = clustered(300).tolist()
    for name, rows in {"0": [[], *vectors, [1.0]], "1": [None, None]}.items():
        column = pa.array(rows, pa.list_(pa.float32()))
        (tmp_path / "vectors").mkdir(exist_ok=True)
        data = {"embedding": column} | ({"error": pa.array(["empty", None])} if name == "1" else {})
        pq.write_table(pa.table(data), tmp_path / "vectors" / f"{name}.parquet")
    card = built(tmp_path / "vectors", tmp_path / "index")

    assert (card["dim"], card["rows"], card["vectors"], card["without_vector"]) == (DIM, 304, 300, 4)


def test_a_merge_that_cannot_be_is_refused_of_an_old_index_too(source, tmp_path):
    """--merge added to the command of a flat index is refused as in its first command."""
    built(source, tmp_path / "index", kind="flat")

    with pytest.raises(UsageError, match="--merge 1: faiss cannot merge flat"):
        built(source, tmp_path / "index", kind="flat", merge=1)


def test_what_another_build_left_is_not_taken_over(source, tmp_path):
    """With _run.json and _stages deleted, what was trained for another kind is refused."""
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)
    (tmp_path / "index" / "_run.json").unlink()
    for name in ("_stages", "segments", "rows"):
        shutil.rmtree(tmp_path / "index" / name)
    for name in ("card.json", "manifest.json"):
        (tmp_path / "index" / name).unlink()

    with pytest.raises(UsageError, match=r"holds trained\.faiss, and no build of ours"):
        built(source, tmp_path / "index", kind="ivf-sq8", lists=LISTS)


def test_vectors_of_two_models_are_refused(source, tmp_path, vectors):
    """Files of two models, or of one with two prompts, are refused, naming both files and what differs."""
    write(source / "other.parquet", vectors[:10], model="another model", prompt="query: ")

    with pytest.raises(InputError, match=r"other\.parquet were not made alike \(model: 'a model' and 'another model'"):
        built(source, tmp_path / "index")


def test_vectors_of_two_sizes_are_refused(source, tmp_path):
    """Files of other dimensions are refused, naming both."""
    write(source / "wide.parquet", clustered(10, dim=2 * DIM))

    with pytest.raises(InputError, match=rf"vectors of {DIM} and of {2 * DIM} \(dim\).*wide\.parquet"):
        built(source, tmp_path / "index")


def test_grown_vectors_of_another_model_are_refused(source, tmp_path, vectors):
    """An index is not mixed with vectors of a model that came later, also when every old file is gone."""
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)
    for path in source.iterdir():
        path.unlink()
    write(source / "0.parquet", vectors, revision="r2")

    with pytest.raises(InputError, match=r"build another index"):
        built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)


def test_bits_are_refused(tmp_path):
    """ubinary vectors are refused, with what to embed instead."""
    write(tmp_path / "vectors" / "0.parquet", clustered(300), output_dtype="ubinary")

    with pytest.raises(InputError, match="--output-dtype float16"):
        built(tmp_path / "vectors", tmp_path / "index")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"kind": "ivf"}, r"--kind 'ivf': choose from auto, flat, hnsw"),
        ({"kind": "ivf-rabitq:bits=5"}, r"bits=5: choose from 1, 2, 3, 4"),
        ({"kind": "ivf-rabitq:bit=1"}, r"has no 'bit'. It has bits"),
        ({"kind": "ivf-pq:code=7"}, r"code=7: it must divide the vectors' 32 dimensions"),
        ({"kind": "ivf-pq:code=x"}, r"code='x' is not a whole number"),
        ({"kind": "ivf-pq:code=²"}, r"code='²' is not a whole number"),
        ({"kind": "ivf-flat", "lists": 1000}, r"--lists 1,000 takes 39,000 vectors to train.*there are 3,000"),
        ({"kind": "flat", "lists": 4}, r"flat has no lists"),
        ({"kind": "ivf-flat", "memory": "10KB"}, r"over --memory 10KB"),
        ({"memory": "1KB"}, r"take .* at least .ivf-rabitq:bits=1"),
        ({"memory": "much"}, r"--memory 'much' is no size"),
        ({"recall": 1.5}, r"--recall 1.5 is a share"),
        ({"min_recall": 0.0}, r"--min-recall 0 is a share"),
        ({"exports": ("qdrant",)}, r"--exports qdrant: choose from centroids"),
        ({"keep_columns": ("code",)}, r"--keep-columns code: the rows have a column"),
        ({"suppose": "10x10"}, r"--suppose is for --dry-run"),
        ({"vector_column": "v"}, r"no column 'v' \(there: id, embedding, error\)"),
        ({"id_column": "name"}, r"no column 'name'"),
    ],
)
def test_wrong_commands_are_answered_before_anything_is_made(source, tmp_path, more, words):
    """A wrong value is named with the choices and the next action, and nothing has begun."""
    with pytest.raises((UsageError, InputError), match=words):
        built(source, tmp_path / "index", **more)

    assert not (tmp_path / "index" / "_stages").exists()


def test_too_few_vectors_to_train(tmp_path):
    """A codec on a handful of vectors is refused; rows without vectors do not count as ones to train on."""
    write(tmp_path / "few" / "0.parquet", clustered(100))
    write(tmp_path / "holes" / "0.parquet", clustered(2000), absent=tuple(range(1900)))

    with pytest.raises(UsageError, match=r"100 vectors are too few.*--kind flat"):
        built(tmp_path / "few", tmp_path / "a", kind="ivf-pq")
    with pytest.raises(InputError, match="vectors to train on are too few for 16 lists"):
        built(tmp_path / "holes", tmp_path / "b", kind="ivf-flat", lists=16)


def test_rows_without_a_vector_make_fewer_lists(tmp_path):
    """Lists that nobody asked for are no more than the vectors there are can train, which is told: the sample shows how many."""
    write(
        tmp_path / "vectors" / "0.parquet", clustered(3000), absent=tuple(range(0, 3000, 2)) + tuple(range(1, 2400, 2))
    )
    messages = listen()
    card = built(tmp_path / "vectors", tmp_path / "index", kind="ivf-flat")

    assert card["vectors"] == 300
    assert card["lists"] < 16
    assert any("lists: 2" in sentence and "rows of the sample have a vector" in sentence for sentence in messages)
    assert any(note.startswith(f"{card['lists']} lists and not ") for note in card["notes"])
    with pytest.raises(InputError, match="too few for 32 lists"):
        built(tmp_path / "vectors", tmp_path / "other", kind="ivf-flat", sample_rows=1500)


@pytest.mark.parametrize(
    ("type", "id"), [(pa.binary(2), b"\xff\xfe"), (pa.binary(), b"\xff\xfe"), (pa.list_(pa.int64()), [1])]
)
def test_ids_that_name_no_row(tmp_path, type, id):
    """Bytes that are no text, as those of UUIDs, and lists are refused before anything is computed; bytes that are text are read."""
    path = write(tmp_path / "vectors" / "0.parquet", clustered(300))
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "id", pa.array([id] * 300, type)), path)

    with pytest.raises(InputError, match=r"column 'id' is .*: ids are text or numbers.*--id-column"):
        built(tmp_path / "vectors", tmp_path / "index", kind="flat")
    assert not (tmp_path / "index" / "_stages").exists()
    if not pa.types.is_nested(type):
        pq.write_table(table.set_column(0, "id", pa.array([b"ab"] * 300, type)), path)
        assert built(tmp_path / "vectors", tmp_path / "index", kind="flat")["vectors"] == 300


def test_a_file_whose_vectors_are_all_null(source, tmp_path):
    """A column of type null, as pandas writes it, is one of rows without a vector."""
    gone = pa.table(
        {"id": pa.array(["n1", "n2"], pa.large_string()), "embedding": pa.nulls(2), "error": pa.nulls(2, pa.string())}
    )
    pq.write_table(gone, source / "0-null.parquet")
    card = built(source, tmp_path / "index", kind="flat")

    assert (card["vectors"], card["without_vector"]) == (ROWS, 2)


def test_queries_without_a_vector_do_not_measure(source, tmp_path):
    """--queries of nothing but NaN are refused before anything is computed."""
    write(tmp_path / "queries" / "0.parquet", np.full((50, DIM), np.nan, np.float32))

    with pytest.raises(InputError, match=r"--queries .*of the rows that were read none has a vector of finite numbers"):
        built(source, tmp_path / "index", kind="flat", queries=str(tmp_path / "queries"))
    assert not (tmp_path / "index" / "_stages").exists()


def test_an_input_without_any_vector(tmp_path):
    """It is told, and not indexed as nothing."""
    write(tmp_path / "vectors" / "0.parquet", clustered(300), absent=tuple(range(300)))

    with pytest.raises(InputError, match="no row of the sample"):
        built(tmp_path / "vectors", tmp_path / "index")


def test_queries_of_another_model_do_not_measure(source, tmp_path):
    """--queries of another model, or that are not there, are refused before anything is computed, naming both models."""
    write(tmp_path / "queries" / "0.parquet", clustered(100), model="other", revision="r9")

    with pytest.raises(InputError, match=r"--queries .*vectors of other in 32 dimensions"):
        built(source, tmp_path / "index", kind="flat", queries=str(tmp_path / "queries"))
    with pytest.raises(InputError, match="nowhere"):
        built(source, tmp_path / "index", kind="flat", queries=str(tmp_path / "nowhere"))
    assert not (tmp_path / "index" / "_stages").exists()


def test_queries_are_read_as_their_own_files_say(source, tmp_path, vectors):
    """int8 queries with ranges of their own and no ids measure an index of float vectors as the same queries in float32 do;
    other ones in the same place are measured anew."""
    queries = clustered(200, seed=6)
    low, high = queries.min(axis=0) * 1.1, queries.max(axis=0) * 1.1
    coded = np.round((queries - low) / (high - low) * 255 - 128.5).clip(-128, 127).astype(np.int8)
    write(tmp_path / "floats" / "0.parquet", queries)
    write(tmp_path / "coded" / "0.parquet", coded, output_dtype="int8", int8_ranges=[low.tolist(), high.tolist()])
    table = pq.read_table(tmp_path / "coded" / "0.parquet")
    pq.write_table(table.drop_columns(["id"]), tmp_path / "coded" / "0.parquet")
    shape = {"kind": "ivf-flat", "lists": LISTS, "id_column": "id"}
    cards = [built(source, tmp_path / "index", queries=str(tmp_path / name), **shape) for name in ("floats", "coded")]
    first, second = ([row["recall@10"][0] for row in card["recall"]] for card in cards)
    write(tmp_path / "floats" / "0.parquet", vectors[:150])
    third = built(source, tmp_path / "index", queries=str(tmp_path / "floats"), **shape)

    assert second == pytest.approx(first, abs=0.03)
    assert 0.1 < first[0] < 0.9
    assert third["queries"]["count"] == 150

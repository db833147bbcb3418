"""jobs/build_index.py: the index equals one that faiss builds in one process, and its card tells the measured recall."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.corpus import Corpus
from lib.data.formats import Measure
from lib.data.vectors import as_matrix
from lib.errors import UsageError
from lib.index.build.codec import Coder, fill, load_index, open_merged, open_segment, quantization_error
from lib.index.build.sample import sample_plan
from lib.index.build.stage_parts import read_training_vectors
from lib.index.build.train import shares
from lib.index.kinds import names, parse, search_parameter_values
from lib.storage.listing import InputFile
from tests.support.indexed import DIM, built, clustered, cut_small, segments, write, write_many
from tests.support.messages import listen

ROWS, LISTS = 4000, 16
# Codes long enough that few of these short vectors tie.
FINE = {"ivf-pq": "ivf-pq:code=16", "ivf-opq": "ivf-opq:code=16", "ivf-pq-fastscan": "ivf-pq-fastscan:groups=32"}
KINDS = [*(FINE.get(name, name) for name in names()), "ivf-rabitq:bits=1"]
OURS = ["ivf-rabitq"]  # of 4 bits; tests/index/test_kinds.py holds them against faiss's
# BLAS rounds rotated vectors by how many are rotated at once; fast-scan its tables, in an index that was read.
ROUNDED = "rabitq", "opq", "fastscan"
IVF = [kind for kind in KINDS if kind.startswith("ivf")]
MERGED = [kind for kind in IVF if parse(kind).mergeable]


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(ROWS)


@pytest.fixture
def source(tmp_path, vectors):
    return write_many(tmp_path / "vectors", vectors)


@pytest.fixture(scope="module")
def index_of(tmp_path_factory, vectors):
    """index_of(kind): the output and the card of an index of the vectors, built once; all of the same files and sample."""
    folder = tmp_path_factory.mktemp("index")
    source = write_many(folder / "vectors", vectors)

    @cache
    def make(kind: str) -> tuple[Path, dict[str, Any]]:
        output = folder / kind.replace(":", "-")
        return output, built(source, output, kind=kind, recall_queries=200, **lists_for(kind))

    return make


def lists_for(kind: str) -> dict[str, int]:
    return {"lists": LISTS} if parse(kind).has_lists else {}


def rows_of(output) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / "rows").glob("part-*.parquet")))


def plain(output, name: str, vectors: np.ndarray) -> faiss.Index:
    """The trained index with all vectors added at once in one process: by faiss itself, but for the kinds whose codes are ours."""
    kind, index = parse(name), load_index((output / "trained.faiss").read_bytes())
    numbers, unit = np.arange(len(vectors), dtype=np.int64), vectors / np.linalg.norm(vectors, axis=1)[:, None]
    if name in OURS:
        fill(kind, index, numbers, *Coder(kind, index).encode(unit))
    else:
        index.add_with_ids(unit, numbers)
    return kind.finalize(index)


def assert_alike(kind: str, result: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    """The same scores, to the bit where nothing rounds them, and the same numbers, ties aside."""
    slack = 1e-5 if any(name in kind for name in ROUNDED) else 0.0
    scores, numbers = result
    np.testing.assert_allclose(scores, wanted[0], rtol=slack, atol=slack / 10)
    untied = np.ones_like(numbers, bool)
    untied[:, 1:] &= np.abs(scores[:, 1:] - scores[:, :-1]) > slack
    untied[:, :-1] &= untied[:, 1:]
    untied[:, -1] = False  # the next one, which is not listed, may tie with it
    assert np.array_equal(numbers[untied], wanted[1][untied])
    assert untied.mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_what_faiss_makes_in_one_process(index_of, vectors, kind):
    """Ids and distances of every kind are those of the same trained index to which one process adds all, ties aside."""
    output, _ = index_of(kind)
    index, wanted = open_segment(str(segments(output)[0])), plain(output, kind, vectors)
    queries = clustered(50, seed=5)
    for value in (search_parameter_values(parse(kind), LISTS)[0], search_parameter_values(parse(kind), LISTS)[-1]):
        for each in (index, wanted):
            if parse(kind).search_parameter:
                faiss.ParameterSpace().set_index_parameter(each, parse(kind).search_parameter, value)
        assert_alike(kind, index.search(queries, 10), wanted.search(queries, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_tells_the_recall_that_numpy_measures(index_of, vectors, kind):
    """recall@1, 10 and 100 of the card are what one gets from the faiss files and a product of matrices."""
    output, card = index_of(kind)
    (place,) = (output / "_stages").glob("queries-*/queries.parquet")
    numbers = pq.read_table(place)["number"].to_numpy()
    queries = vectors[numbers]
    scores = queries @ vectors.T
    scores[np.arange(len(numbers)), numbers] = -np.inf
    index = open_segment(str(segments(output)[0]))

    assert len(numbers) == card["queries"]["count"] >= 190
    for row in card["recall"]:
        if card["search_parameter"]:
            faiss.ParameterSpace().set_index_parameter(index, card["search_parameter"], row["value"])
        _, lists = index.search(queries, 101)
        for cut in (1, 10, 100):
            nearest = np.argsort(-scores, axis=1)[:, :cut]
            others = [[n for n in line if n != own][:cut] for line, own in zip(lists, numbers, strict=True)]
            hits = [len(set(a) & set(b)) / cut for a, b in zip(others, nearest.tolist(), strict=True)]
            assert row[f"recall@{cut}"][0] == pytest.approx(
                np.mean(hits), abs=0.04 if "fastscan" in kind else 0.006
            )  # of ties any


def test_queries_that_are_measured_with_are_not_trained_on(source, tmp_path, monkeypatch):
    """No held-out vector trains centroids and codec; all others of the sample do."""
    samples = []

    def spy(*args):
        samples.append(read_training_vectors(*args))
        return samples[-1]

    monkeypatch.setattr("lib.index.build.train.read_training_vectors", spy)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)
    parts = sorted((tmp_path / "index" / "_stages" / "sample").glob("part-*.parquet"))
    table = pa.concat_tables(pq.read_table(path) for path in parts)
    held_out = table["held_out"].to_numpy()
    queries = {vector.tobytes() for vector in as_matrix(table["vector"], np.float32)[held_out]}
    trained = {vector.tobytes() for vector in np.concatenate(samples)}

    assert 0 < held_out.sum() <= 0.1 * ROWS
    assert len(trained) == (~held_out).sum() >= 39 * LISTS
    assert not queries & trained


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_index_is_the_one_built_in_one_process(source, tmp_path, vectors, kind, monkeypatch):
    """Merged on disk from many segments, ids and distances equal those of one process; also after both files were moved."""
    cut_small(monkeypatch, 700 * parse(kind).bytes(DIM))
    output = tmp_path / "index"
    built(source, output, kind=kind, lists=LISTS, shard_rows=500, merge=1)
    assert len(segments(output)) > 1
    moved = shutil.move(output / "merged", tmp_path / "elsewhere")
    shutil.rmtree(output / "segments")
    (name,) = [each for each in os.listdir(moved) if each.endswith(".faiss")]
    index, wanted = open_merged(f"{moved}/{name}"), plain(output, kind, vectors)
    queries = clustered(50, seed=6)
    for each in (index, wanted):
        faiss.ParameterSpace().set_index_parameter(each, "nprobe", 4)

    assert index.ntotal == ROWS
    assert_alike(kind, index.search(queries, 10), wanted.search(queries, 10))


def test_k_merged_indexes_are_balanced(source, tmp_path, monkeypatch):
    """--merge 3 leaves three indexes that hold every vector once, each near a third."""
    cut_small(monkeypatch, 4 * DIM * 300)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=250, merge=3)
    files = sorted((tmp_path / "index" / "merged").glob("*.faiss"))
    counts = [open_merged(str(path)).ntotal for path in files]

    assert len(files) == 3
    assert sum(counts) == ROWS
    assert max(counts) - min(counts) <= 600


def test_mapping_a_merged_index_is_a_trap(source, tmp_path):
    """faiss's IO_FLAG_MMAP leaves a merged index without lists, which kills the process that searches it: we never use it there."""
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, merge=1)
    (path,) = (tmp_path / "index" / "merged").glob("*.faiss")
    program = "import faiss, numpy, sys\nindex = faiss.read_index(sys.argv[1], {})\nindex.search(numpy.ones((1, 32), 'f4'), 1)"
    ends = [
        subprocess.run([sys.executable, "-c", program.format(flags), str(path)], capture_output=True).returncode
        for flags in ("faiss.IO_FLAG_MMAP", "faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR")
    ]

    assert ends[0] != 0
    assert ends[1] == 0
    assert faiss.IO_FLAG_MMAP & faiss.IO_FLAG_SKIP_IVF_DATA


def test_product_quantizers_are_trained_without_polysemous_training(index_of):
    """Polysemous training, ten times slower and of no use here, is off in every kind with a product quantizer."""
    for kind in FINE.values():
        whole = load_index((index_of(kind)[0] / "trained.faiss").read_bytes())

        assert faiss.downcast_index(faiss.extract_index_ivf(whole)).do_polysemous_training is False


@pytest.mark.parametrize(("kind", "word"), [("ivf-pq-fastscan", "ivf-pq-fastscan"), ("flat", "flat"), ("hnsw", "hnsw")])
def test_kinds_that_faiss_cannot_merge_refuse_it(source, tmp_path, kind, word):
    """--merge for fast-scan, flat or hnsw is refused with the reason, before anything is built."""
    with pytest.raises(UsageError, match=f"cannot merge {word}.*segments"):
        built(source, tmp_path / "index", kind=kind, merge=1)

    assert not (tmp_path / "index" / "_stages").exists()


def test_a_rotation_rotates_centroids_too(index_of, vectors):
    """Vectors lie as near to their centroids behind a rotation as without one."""
    errors = []
    for kind in ("ivf-flat", "ivf-rabitq", "ivf-opq:code=16"):
        index = load_index((index_of(kind)[0] / "trained.faiss").read_bytes())
        coder, unit = Coder(parse(kind), index), vectors / np.linalg.norm(vectors, axis=1)[:, None]
        errors.append(quantization_error(coder.errors(unit, coder.encode(unit)[0])))

    assert errors == pytest.approx([errors[0]] * 3, rel=1e-3)
    assert errors[0] < 0.9


@pytest.mark.parametrize(("group", "near"), [(32_768, True), (130_000, False)])
def test_the_sample_prefers_the_beginnings_of_short_row_groups(group, near):
    """Blocks near a row group's beginning where all groups are short; evenly over long ones, where order may decide."""
    rows, schema = 1_040_000, pa.schema([])
    breaks = (*range(group, rows, group), rows)
    file = InputFile("a.parquet", "a.parquet", 1, "")
    corpus = Corpus((file,), (Measure(rows, 1.0, True, 8.0, schema, breaks=breaks),), schema, None)
    starts = np.array(sample_plan(corpus, 100_000, DIM)["start"].to_pylist())

    assert (starts % group < group / 2).mean() > 0.9 if near else 0.4 < (starts % group < group / 2).mean() < 0.6
    assert starts.min() < 0.05 * rows
    assert starts.max() > 0.9 * rows


def test_two_levels_of_centroids(source, tmp_path, monkeypatch):
    """Above FLAT_LISTS centroids come by cells, as shards of their own; the index finds nearly what one k-means does."""
    one = built(source, tmp_path / "one", kind="ivf-flat", lists=64)
    for module in ("lib.index.kinds", "lib.index.build.train_job", "lib.index.build.choose_kind"):
        monkeypatch.setattr(f"{module}.FLAT_LISTS", 32)
    two = built(source, tmp_path / "two", kind="ivf-flat", lists=64)
    index = load_index((tmp_path / "two" / "trained.faiss").read_bytes())

    assert (tmp_path / "two" / "_stages" / "centroids").exists()
    assert index.nlist == two["lists"] == 64
    assert isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSWFlat)
    recalls = [{row["value"]: row["recall@10"][0] for row in card["recall"]} for card in (one, two)]
    assert recalls[1][8] > recalls[0][8] - 0.05


def test_shares_of_cells_add_up():
    """Each cell gets centroids in proportion to its points, and never more than it has."""
    points = np.array([100, 0, 7, 1000, 1])

    assert shares(points, 64).sum() <= 64
    assert shares(points, 64).tolist() == [5, 0, 1, 57, 1]
    assert (shares(points, 1108) == points).all()


def test_bad_vectors_are_kept_out_with_a_reason_and_counted(tmp_path, vectors):
    """Null, NaN and infinite vectors are rows with a reason, in no list; ids stay with their own vectors."""
    bad = vectors.copy()
    bad[7, 3], bad[11, 0] = np.nan, np.inf
    write(tmp_path / "vectors" / "0.parquet", bad, absent=(5, 6))
    card = built(tmp_path / "vectors", tmp_path / "index", kind="ivf-flat", lists=LISTS)
    rows = rows_of(tmp_path / "index")
    index = open_segment(str(segments(tmp_path / "index")[0]))
    index.nprobe = LISTS
    _, numbers = index.search(vectors[:200], 1)
    good = [n for n in range(200) if n not in (5, 6, 7, 11)]

    assert (card["rows"], card["vectors"], card["without_vector"]) == (ROWS, ROWS - 4, 4)
    assert [rows["error"][n].as_py() for n in (5, 6, 7, 11)] == ["empty text"] * 2 + ["the vector is not finite"] * 2
    assert rows["list"][7].as_py() is None
    assert numbers[good, 0].tolist() == good
    assert rows["id"].to_pylist() == [f"d{n}" for n in range(ROWS)]


def test_vectors_that_are_not_normalised(tmp_path, vectors):
    """For inner products that is told; --metric cosine, the default, makes it the index of the normalised ones, zeros kept out."""
    long = vectors * np.linspace(0.5, 3, ROWS, dtype=np.float32)[:, None]
    long[3] = 0
    write(tmp_path / "long" / "0.parquet", long)
    write(tmp_path / "unit" / "0.parquet", vectors, absent=(3,))
    messages = listen()
    card = built(tmp_path / "long", tmp_path / "a", kind="flat", metric="ip")
    normal = built(tmp_path / "long", tmp_path / "b", kind="flat")
    built(tmp_path / "unit", tmp_path / "c", kind="flat")
    queries = clustered(20, seed=7)
    numbers = [open_segment(str(segments(tmp_path / name)[0])).search(queries, 10)[1] for name in ("b", "c")]

    assert any("--metric cosine" in line for line in messages)
    assert any("--metric cosine" in note for note in card["notes"])
    assert "they were made so" in normal["notes"][0]
    np.testing.assert_array_equal(*numbers)
    assert normal["without_vector"] == 1


@pytest.mark.parametrize("type", ["float16", "float64", "list", "int8"])
def test_any_type_of_vector_is_read(tmp_path, vectors, type):
    """float16, float64, lists of no fixed length and int8 with its ranges give nearly the float32 index."""
    metadata, column = {}, pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM)
    if type == "list":
        column = column.cast(pa.list_(pa.float32()))
    elif type == "int8":
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        steps = np.clip(np.floor((vectors - low) / ((high - low) / 255)), 0, 255) - 128
        column = pa.FixedSizeListArray.from_arrays(pa.array(steps.astype(np.int8).reshape(-1)), DIM)
        metadata = {"shoal": json.dumps({"int8_ranges": [low.tolist(), high.tolist()], "output_dtype": "int8"})}
    else:
        column = column.cast(pa.list_(getattr(pa, type)(), DIM))
    (tmp_path / "vectors").mkdir()
    table = pa.table({"name": [f"n{row}" for row in range(ROWS)], "v": column}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "vectors" / "0.parquet")
    card = built(tmp_path / "vectors", tmp_path / "index", kind="flat", vector_column="v", id_column="name")
    _, numbers = open_segment(str(segments(tmp_path / "index")[0])).search(vectors[:100], 1)

    assert card["vectors"] == ROWS
    assert (numbers[:, 0] == np.arange(100)).mean() > 0.95
    assert rows_of(tmp_path / "index")["id"][3].as_py() == "n3"


def test_l2_is_measured_as_l2(tmp_path, vectors):
    """With --metric l2 the exact answers are the nearest by distance, also of vectors of any length."""
    long = vectors * np.linspace(0.5, 3, ROWS, dtype=np.float32)[:, None]
    write(tmp_path / "vectors" / "0.parquet", long)
    card = built(tmp_path / "vectors", tmp_path / "index", kind="ivf-flat", lists=LISTS, metric="l2")

    assert card["recall"][-1]["recall@100"][0] > 0.999
    assert card["notes"] == []


def test_other_queries_measure_the_recall(source, tmp_path):
    """--queries measures with those, and leaves no row out."""
    write(tmp_path / "queries" / "0.parquet", clustered(300, seed=8))
    card = built(source, tmp_path / "index", kind="flat", queries=str(tmp_path / "queries"), recall_queries=100)

    assert card["queries"] == {"count": 100, "from": str(tmp_path / "queries")}
    assert card["recall"][0]["recall@10"][0] == 1.0

"""jobs/build_index.py as a run: stopped and started, grown, what was lost and left over."""

import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import RunError
from lib.index.build.codec import open_merged, open_segment
from tests.support.indexed import DIM, ENCODER, built, clustered, cut_small, segments, write, write_many
from tests.support.messages import listen

ROWS, LISTS = 3000, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clustered(ROWS)


@pytest.fixture
def source(tmp_path, vectors):
    return write_many(tmp_path / "vectors", vectors)


@pytest.fixture(scope="module")
def finished_builds(tmp_path_factory, vectors):
    """finished_builds(**shape): the source, the output and the card of a build, made at the first call; the output as it was then."""
    folder = tmp_path_factory.mktemp("finished")
    source, cards = write_many(folder / "vectors", vectors), {}

    def output_of(**shape):
        name = str(shape)
        output, copy = folder / name, folder / f"{name} copy"
        if name not in cards:
            cards[name] = built(source, output, **shape)
            shutil.copytree(output, copy)
        shutil.rmtree(output)
        shutil.copytree(copy, output)
        return source, output, cards[name]

    return output_of


def contents(output) -> dict[str, str]:
    """Checksums of the finished index: what was trained, the rows, the segments, what was merged."""
    kept = [output / "trained.faiss", *sorted((output / "rows").glob("part-*"))]
    kept += [*segments(output), *sorted((output / "merged").glob("*"))]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


# Stopped and started


@pytest.mark.parametrize("stage", ["sample", "train", "rows", "segments", "merged", "exact", "card"])
def test_a_build_that_was_stopped_anywhere_ends_the_same(finished_builds, stage):
    """Whatever a killed command had not yet published, the same command makes again, byte for byte; what is there stays."""
    shape = {"kind": "ivf-rabitq", "lists": LISTS, "shard_rows": 400, "merge": 2}
    source, output, _ = finished_builds(**shape)
    before = contents(output)
    card = json.loads((output / "card.json").read_text())
    order = ["sample", "train", "rows", "segments", "merged", "exact", "card"]
    for late in order[order.index(stage) :]:
        _forget(output, late)
    built(source, output, **shape)

    assert contents(output) == before
    again = json.loads((output / "card.json").read_text())
    assert [row["recall@10"] for row in again["recall"]] == [row["recall@10"] for row in card["recall"]]


def _forget(output, stage: str) -> None:
    """As if the command had been killed in a stage: half of its parts are there, and no manifest."""
    places = {"sample": "_stages/sample", "train": "_stages/train", "rows": "rows", "segments": "_stages/segments-*"}
    places |= {"merged": "_stages/merge-*", "exact": "_stages/exact-*"}
    for folder in output.glob(places.get(stage, "nothing")):
        (folder / "_manifest.parquet").unlink(missing_ok=True)
        for path in sorted(folder.glob("part-*"))[::2]:
            path.unlink()
    if stage == "train":
        (output / "trained.faiss").unlink()
    if stage in ("segments", "merged"):
        (output / "manifest.json").unlink(missing_ok=True)
    if stage == "segments":
        for path in segments(output)[::2]:
            path.unlink()
    if stage == "card":
        (output / "card.json").unlink()


@pytest.mark.parametrize("lost", ["_manifest.parquet", None])
def test_a_kill_between_what_was_trained_and_its_part(finished_builds, lost):
    """With TRAINED published and its stage not audited, or with _stages deleted, the same command ends with the same index."""
    source, output, first = finished_builds(kind="ivf-pq", lists=LISTS)
    before = contents(output)
    (output / "card.json").unlink()
    if lost:
        (output / "_stages" / "train" / lost).unlink()
    else:
        shutil.rmtree(output / "_stages")
    again = built(source, output, kind="ivf-pq", lists=LISTS)

    assert contents(output) == before
    assert again["drift"] == first["drift"]
    assert again["recall"][-1]["recall@10"] == first["recall"][-1]["recall@10"]


def test_what_killed_writers_left_is_swept(finished_builds):
    """Unfinished files of names that are published do not stay."""
    source, output, _ = finished_builds(kind="ivf-flat", lists=LISTS, merge=1)
    left = [
        path.with_name(f".{path.name}.{'0' * 32}.unfinished")
        for path in (segments(output)[0], output / "trained.faiss")
    ]
    for path in left:
        path.write_bytes(b"half")
    (output / "manifest.json").unlink()
    built(source, output, kind="ivf-flat", lists=LISTS, merge=1)

    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("name", ["_plan-0000.parquet", "_run.json", "_manifest.parquet"])
def test_what_a_killed_driver_left_of_a_stage_s_records_is_swept(finished_builds, name):
    """When the stage is done, unfinished files of its plan, record and manifest do not stay."""
    source, output, _ = finished_builds(kind="ivf-flat", lists=LISTS)
    (stage,) = (output / "_stages").glob("probe-*")
    (stage / "_manifest.parquet").unlink()
    (stage / f".{name}.{'0' * 32}.unfinished").write_bytes(b"half")
    built(source, output, kind="ivf-flat", lists=LISTS)

    assert not list(output.rglob(".*.unfinished"))


def test_the_same_command_again_changes_nothing(finished_builds):
    """A finished build is left as it is."""
    source, output, _ = finished_builds(kind="ivf-flat", lists=LISTS)
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in segments(output)}
    built(source, output, kind="ivf-flat", lists=LISTS)

    assert contents(output) == before
    assert {path: path.stat().st_mtime_ns for path in segments(output)} == times


def test_a_build_on_ray_is_the_same(cluster, source, tmp_path):
    """Every file of an index is the same byte for byte, built by workers of a Ray cluster or in this process."""
    shape = {"kind": "ivf-rabitq", "lists": LISTS, "shard_rows": 700, "merge": 1}
    built(source, tmp_path / "local", **shape)
    card = built(source, tmp_path / "ray", **shape, executor="ray", max_workers=2, cpus_per_worker=1)

    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert card["recall"][0]["recall@10"][0] > 0.5


def test_other_settings_are_another_index(finished_builds):
    """The same output with another kind is refused, naming both."""
    source, output, _ = finished_builds(kind="ivf-flat", lists=LISTS)

    with pytest.raises(RunError, match=r"kind: there 'ivf-flat', asked 'ivf-sq8'"):
        built(source, output, kind="ivf-sq8", lists=LISTS)


# Grown


def test_new_files_are_added_without_training_again(source, tmp_path, vectors):
    """Vectors of new files become new segments; the old ones and what was trained stay; everything is found."""
    shape = {"kind": "ivf-sq8", "lists": LISTS}
    built(source, tmp_path / "index", **shape)
    before = contents(tmp_path / "index")
    more = clustered(500, seed=3)
    write(source / "a-first-by-name.parquet", more, first=ROWS)
    card = built(source, tmp_path / "index", **shape)
    after = contents(tmp_path / "index")
    indexes = [open_segment(str(path)) for path in segments(tmp_path / "index")]
    for index in indexes:
        index.nprobe = LISTS
    results = [index.search(more[:50], 1) for index in indexes]

    assert before.items() <= after.items()
    assert (card["rows"], card["vectors"], card["segments"]) == (ROWS + 500, ROWS + 500, 2)
    assert (results[1][1][:, 0] == ROWS + np.arange(50)).all()
    assert (results[1][0] < results[0][0]).all()  # squared distances
    assert card["recall"][-1]["recall@10"][0] > 0.9
    assert card["drift"]["generations"][1] == pytest.approx(1, abs=0.2)
    assert card["drift"]["rebuild"] == []


def test_a_grown_index_is_merged_again(source, tmp_path):
    """--merge after an addition leaves one merged index with everything, and no file of the one before."""
    shape = {"kind": "ivf-sq8", "lists": LISTS, "merge": 1}
    built(source, tmp_path / "index", **shape)
    write(source / "z.parquet", clustered(500, seed=3), first=ROWS)
    built(source, tmp_path / "index", **shape)
    (path,) = (tmp_path / "index" / "merged").glob("*.faiss")

    assert open_merged(str(path)).ntotal == ROWS + 500
    assert len(list((tmp_path / "index" / "merged").iterdir())) == 2


def test_drift_is_reported(source, tmp_path):
    """New vectors that lie far from the centroids raise the drift, and the card says to rebuild."""
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)
    strange = (
        np.random.default_rng(1).standard_normal((400, DIM)) * np.linspace(0, 2, DIM) ** 2
    )  # where the others vary least
    strange = (strange / np.linalg.norm(strange, axis=1, keepdims=True)).astype(np.float32)
    write(source / "z.parquet", strange, first=ROWS)
    card = built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)

    assert card["drift"]["generations"][1] > 1.25
    assert "times as far" in card["drift"]["rebuild"][0]
    assert "Rebuild" in (tmp_path / "index" / "README.md").read_text()


# Lost and left over


def test_merged_indexes_are_complete_whatever_was_merged_before(source, tmp_path, monkeypatch):
    """--merge 2, then 3, then 2 again, and 2 after its files were deleted: each leaves as many indexes, with every vector."""
    cut_small(monkeypatch, 700 * 4 * DIM)
    output = tmp_path / "index"
    for count in (2, 3, 2, 2):
        built(source, output, kind="ivf-flat", lists=LISTS, merge=count)
        merged = sorted((output / "merged").glob("*.faiss"))

        assert sum(open_merged(str(path)).ntotal for path in merged) == ROWS
        assert len(merged) == count
        if count == 2:
            merged[0].unlink()
    built(source, output, kind="ivf-flat", lists=LISTS, merge=2)
    assert len(list((output / "merged").glob("*.faiss"))) == 2


def test_a_lost_segment_is_rebuilt(source, tmp_path, monkeypatch):
    """A segment that is gone, or cut short, comes back with the same bytes, though segments would be larger now; the user is told."""
    cut_small(monkeypatch, 700 * 4 * DIM)
    output, messages = tmp_path / "index", listen()
    built(source, output, kind="ivf-flat", lists=LISTS)
    before = contents(output)
    first, second, *_ = segments(output)
    first.unlink()
    second.write_bytes(b"half")
    cut_small(monkeypatch, 1400 * 4 * DIM)
    built(source, output, kind="ivf-flat", lists=LISTS)

    assert contents(output) == before
    assert any(sentence.startswith("warning: 2 segments of") for sentence in messages)


def test_segments_of_a_stopped_addition_do_not_stay(source, tmp_path):
    """What a command that was stopped had published, and no manifest names, is not left among the segments."""
    output = tmp_path / "index"
    built(source, output, kind="ivf-flat", lists=LISTS)
    (output / "segments" / "segment-000000000000-of-another.faiss").write_bytes(b"rows that are in other segments too")
    write(source / "z.parquet", clustered(500, seed=3), first=ROWS)
    card = built(source, output, kind="ivf-flat", lists=LISTS)

    assert len(segments(output)) == card["segments"] == 2


def test_recall_is_measured_again_with_another_number_of_queries(source, tmp_path):
    """--recall-queries may change from command to command; more than were held out are not there, and that is said."""
    output, messages = tmp_path / "index", listen()
    first = built(source, output, kind="flat", recall_queries=100)
    second = built(source, output, kind="flat", recall_queries=50)
    third = built(source, output, kind="flat", recall_queries=5000)

    assert first["queries"]["count"] <= third["queries"]["count"] < 5000
    assert second["queries"]["count"] == 50
    assert any("there are no more" in sentence for sentence in messages)


def test_encoder_and_kept_columns_are_in_card_and_rows(source, tmp_path):
    """The card has the model's identity; kept columns lie beside the ids."""
    for path in source.iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("year", pa.array([2020] * len(table))), path)
    card = built(source, tmp_path / "index", kind="flat", keep_columns=("year",), limit=1000)

    assert card["encoder"] == ENCODER
    assert card["rows"] == 1000
    (first, *_) = sorted((tmp_path / "index" / "rows").glob("part-*"))
    assert pq.read_schema(first).names == ["id", "year", "list", "code", "error"]


def test_an_index_that_finds_too_little_is_an_error(source, tmp_path):
    """--min-recall ends the command with what was reached, and the index is there; the same command with less of it ends well."""
    shape = {"kind": "ivf-pq:code=2", "lists": LISTS}
    with pytest.raises(RunError, match=r"recall@10 is 0\.\d{4} at most, under --min-recall 0.99.*in a new --output"):
        built(source, tmp_path / "index", min_recall=0.99, **shape)
    before = contents(tmp_path / "index")

    assert built(source, tmp_path / "index", min_recall=0.01, **shape)["vectors"] == ROWS
    assert contents(tmp_path / "index") == before

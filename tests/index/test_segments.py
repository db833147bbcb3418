"""The segments of an index: how many, how large, and what merging them holds in memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.index.build.codec import open_merged
from lib.index.build.segments_job import balance
from tests.support.indexed import DIM, built, clustered, cut_small, exact, segments, write, write_many
from tests.support.messages import listen

ROWS, LISTS = 4000, 16
MERGING = """
import resource, sys
import faiss, numpy as np
from lib.index.build.segments import merge_on_disk

place, count, dim, lists = sys.argv[1], 16, 256, 16_384
quantizer = faiss.IndexFlatL2(dim)
quantizer.add(np.zeros((lists, dim), np.float32))
empty = faiss.IndexIVFFlat(quantizer, dim, lists)
for number in range(count):
    segment = faiss.deserialize_index(faiss.serialize_index(empty))
    segment.add_with_ids(np.ones((10, dim), np.float32), np.arange(10) + 10 * number)
    faiss.write_index(segment, f"{place}/{number}")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_on_disk(empty, [f"{place}/{number}" for number in range(count)], place, "merged.ivfdata")
assert empty.ntotal == 10 * count
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / (4 * dim * lists))
"""


@pytest.fixture
def source(tmp_path):
    return write_many(tmp_path / "vectors", clustered(ROWS))


def test_merging_holds_no_segment_s_centroids(tmp_path):
    """Of 16 segments merged, which all repeat them, no more than two segments' centroids are in memory."""
    line = [sys.executable, "-c", MERGING, str(tmp_path)]
    ran = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)

    assert ran.returncode == 0, ran.stderr[-2000:]
    assert float(ran.stdout.splitlines()[-1]) < 2


@pytest.mark.parametrize("count", [2, 3, 4])
def test_merged_indexes_are_of_as_many_segments_each(source, tmp_path, count, monkeypatch):
    """As many as were asked for, of about as many vectors, where one segment would have been enough."""
    cut_small(monkeypatch, 1 << 20)
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, shard_rows=100, merge=count)
    counts = [open_merged(str(path)).ntotal for path in sorted((tmp_path / "index/merged").glob("*.faiss"))]

    assert len(counts) == len(segments(tmp_path / "index")) == count
    assert sum(counts) == ROWS
    assert max(counts) - min(counts) <= 100


def test_an_addition_is_one_segment_whatever_is_merged(source, tmp_path):
    """Each segment repeats the centroids: the vectors of an addition are not cut for --merge as the first ones are."""
    output, shape = tmp_path / "index", {"kind": "ivf-flat", "lists": LISTS, "shard_rows": 100, "merge": 4}
    built(source, output, **shape)
    write(source / "more.parquet", clustered(500, seed=9), first=ROWS)
    card = built(source, output, **shape)

    assert card["segments"] == 5
    assert len(card["merged"]) == 4


def test_another_merge_goes_on_where_a_command_was_stopped(source, tmp_path):
    """Stopped while segments are filled, --merge may change: they are cut anew, and none of the others stays."""
    output, shape = tmp_path / "index", {"kind": "ivf-flat", "lists": LISTS, "shard_rows": 100}
    built(source, output, **shape, merge=2)
    (output / "manifest.json").unlink()
    for folder in (output / "_stages").glob("segments-*"):
        (folder / "_manifest.parquet").unlink()
        sorted(folder.glob("part-*"))[0].unlink()
    card = built(source, output, **shape, merge=3)

    assert len(card["merged"]) == card["segments"] == len(segments(output)) == 3


def test_fewer_merged_indexes_than_requested_are_reported(source, tmp_path):
    """With what makes more of them."""
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS)
    messages = listen()
    built(source, tmp_path / "index", kind="ivf-flat", lists=LISTS, merge=4)

    assert "--merge 4: 1 are made, of 1 segments. For more choose a new --output and fewer --shard-rows" in messages


def test_files_merged_before_an_addition_are_reported(source, tmp_path):
    """Files that hold less than the index now does stay, for they may be in use; the user hears of it, and the card names none."""
    output = tmp_path / "index"
    built(source, output, kind="ivf-flat", lists=LISTS, merge=1)
    write(source / "more.parquet", clustered(500, seed=9), first=ROWS)
    messages = listen()
    card = built(source, output, kind="ivf-flat", lists=LISTS)

    assert any(
        message.startswith("warning: ") and "merged holds what there was before" in message and "--merge" in message
        for message in messages
    )
    assert card["merged"] == []
    again = built(source, output, kind="ivf-flat", lists=LISTS, merge=1)
    assert sorted(again["merged"]) == sorted(path.name for path in (output / "merged").glob("*.faiss"))


@pytest.mark.parametrize(
    ("kind", "more"), [("flat", {}), ("ivf-flat", {"lists": 4}), ("ivf-flat", {"lists": 4, "merge": 2})]
)
def test_the_card_s_python_searches_all_of_the_index(source, tmp_path, kind, more, monkeypatch):
    """What README.md says to run finds what exact search does, in all segments or all that these were merged into."""
    cut_small(monkeypatch, 4 * DIM * 700)
    output = tmp_path / "index"
    card = built(source, output, kind=kind, shard_rows=300, recall=1.0, **more)
    program = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"queries": clustered(20, seed=5)}
    monkeypatch.chdir(output)
    exec(program, names)

    assert card["segments"] > 1
    assert np.array_equal(names["numbers"], exact(names["queries"], clustered(ROWS), 10))


def test_balanced_groups():
    """Neighbouring segments, each once, in groups of about as many vectors."""
    segments = [{"vectors": size} for size in (5, 1, 1, 1, 5, 3)]
    groups = balance(segments, 3)

    assert [segment for group in groups for segment in group] == segments
    assert [sum(segment["vectors"] for segment in group) for group in groups] == [5, 8, 3]
    assert balance(segments[:1], 3) == [segments[:1]]

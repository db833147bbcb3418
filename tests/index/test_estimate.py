"""The forecast of an index build: held against builds in this process, and against what must be true of a billion vectors."""

import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.cli.options import configure
from lib.engine.run import read_plan
from lib.engine.stage_log import StageLog
from lib.engine.workers import WORKER_BASE
from lib.errors import InputError, RunError, UsageError
from lib.index.build.config import IndexConfig, open_index_build
from lib.index.build.segments_job import encode, read_manifest
from lib.index.build.train_job import train
from lib.index.build_job import build
from lib.index.estimate.forecast import clock_of, forecast, foresee, to_lines
from lib.index.kinds import GRAPH, ID_BYTES
from tests.support.messages import listen

ROWS, DIM = 24_000, 32
TRAINING = {  # stage: its folder
    "sample": "sample",
    "train: cells": "cells",
    "train: partition": "partitioned",
    "train: centroids": "centroids",
    "train": "train",
}


def write(folder, rows=ROWS, dim=DIM, dtype=np.float32):
    """Random vectors in two files, of length 1 where they are floats."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(2):
        vectors = random.standard_normal((rows // 2, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        numbers = (vectors * 127).astype(dtype) if dtype is np.int8 else vectors.astype(dtype)
        column = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), dim)
        ids = [f"{number}-{row}" for row in range(rows // 2)]
        pq.write_table(pa.table({"id": ids, "embedding": column}), folder / f"{number}.parquet", row_group_size=3000)
    return folder


def config(folder, **changes):
    """One worker of one core, for the forecast as for the build; no Ray."""
    defaults = {"output": str(folder / "index"), "dry_run": True, "executor": "local", "cpus_per_worker": 1}
    return configure(IndexConfig, **(defaults | changes))


def real(folder, **changes):
    """Of an input that is there."""
    return config(folder, input=str(folder / "in"), **changes)


def files_below(folder):
    return sum(len(names) for _, _, names in os.walk(folder))


def parts_in(folder):
    return len(list(folder.glob("part-*.parquet")))


def test_a_supposed_billion(tmp_path):
    """A billion vectors of 1,024 dimensions are planned within 20 seconds of a core: training in two levels, every stage, the
    index's size to 2 %; and nothing is written."""
    began = time.process_time()
    result = foresee(config(tmp_path, suppose="1000000000x1024"))
    lines = "\n".join(to_lines(result, price_per_hour=0.05))

    assert time.process_time() - began < 20
    two_levels = ["train: cells", "train: partition", "train: centroids", "train"]
    assert [stage.name for stage in result.stages] == [
        *("sample", *two_levels, "encode", "segments"),
        *("measure: probe", "measure: probe lists"),
        *("measure: exact", "measure: exact lists", "measure: exact lists, 2"),
    ]
    choice, stages = result.build.choice, {stage.name: stage for stage in result.stages}
    assert choice.lists == 131_072
    centroids = len(result.segments) * 131_072 * (4096 + 8 * GRAPH)  # each piece repeats them
    assert choice.bytes == pytest.approx(1e9 * (choice.kind.bytes(1024) + ID_BYTES) + centroids, rel=0.02)
    assert stages["encode"].shards == pytest.approx(1e9 / 16_384, rel=0.01)
    assert stages["encode"].read >= 1e9 * 4096
    read = stages["train"].read - 131_072 * 4096  # beside the centroids: two levels leave only the codec to train
    assert 65_536 * 4096 <= read < 2 * 65_536 * 4096
    assert stages["train"].memory > WORKER_BASE + read + 2 * result.trained
    assert 20e-6 < stages["encode"].seconds / 1e9 < 5e-3
    for stage in result.stages:
        assert min(stage.seconds, stage.read, stage.written) > 0
        assert stage.memory >= WORKER_BASE
        assert stage.objects > stage.shards
    assert "100 cores" in lines
    assert "131,072 lists by their graph, an estimate" in lines
    assert "$" in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["1e9x1024", "1000000000", "x1024", "0x64", "10x0", "-5x64", "10 x 64", "1000X64", "10x64x4", "10000000001x64"],
)
def test_wrong_suppositions(text, tmp_path):
    """What is not ROWSxDIM, or more rows than one process can plan, is refused with the value and how it is written."""
    with pytest.raises(UsageError, match=f"(?=.*{text})(?=.*10000000000?x)"):
        forecast(config(tmp_path, suppose=text))


def test_an_input_and_a_supposition(tmp_path):
    """A corpus is there or supposed: both together are refused."""
    with pytest.raises(UsageError, match="Give one"):
        forecast(real(tmp_path, suppose="1000x64"))


@pytest.mark.parametrize("flat_lists", [65_536, 256])
def test_a_forecast_is_what_a_build_makes(flat_lists, tmp_path, monkeypatch):
    """Shards, parts, segments and objects of every stage, with training in one level and in two, are those of the build that
    follows; the forecast itself leaves no file."""
    for module in ("kinds", "build.choose_kind", "build.train_job", "estimate.costs", "estimate.stages"):
        monkeypatch.setattr(f"lib.index.{module}.FLAT_LISTS", flat_lists)
    monkeypatch.setattr("lib.index.build.segments.SEGMENT_BYTES", ROWS // 4 * (DIM + ID_BYTES))
    monkeypatch.setattr("lib.index.build.recall_job.PARTS_AT_ONCE", 2)
    monkeypatch.setattr("lib.index.build.sample.SHARD_BYTES", 1 << 19)
    monkeypatch.setattr("lib.index.build.train.CODEC_ROWS", ROWS // 3)
    write(tmp_path / "in")
    settings = {"kind": "ivf-sq8", "lists": 512, "merge": 2, "recall_queries": 100, "shard_rows": 3000}
    result = foresee(real(tmp_path, **settings))

    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert files_below(tmp_path) == 2
    build(real(tmp_path, **settings))
    out, stages = tmp_path / "index", {stage.name: stage for stage in result.stages}
    assert stages["encode"].shards == parts_in(out / "rows")
    assert stages["sample"].shards == parts_in(out / "_stages" / "sample")
    opened = open_index_build(real(tmp_path, **settings))
    generations = read_manifest(opened)["generations"]
    assert stages["segments"].shards == len(result.segments) == len(generations[0]["segments"]) > 2
    size = result.codes + len(result.segments) * result.trained
    assert size == pytest.approx(sum(segment["bytes"] for segment in generations[0]["segments"]), rel=0.1)
    assert result.trained == pytest.approx((out / "trained.faiss").stat().st_size, rel=0.01)
    assert ("train: cells" in stages) == (flat_lists < 512)
    for name, folder in TRAINING.items():
        plan = list((out / "_stages" / folder).glob("_plan*"))
        assert (name in stages) == bool(plan)
        assert not plan or stages[name].slices == read_plan(opened.stage(folder))[0].num_rows
    assert sum(stage.objects for stage in result.stages) == files_below(out)


def test_seconds_of_encoding(tmp_path):
    """The seconds of a core that encoding is expected to take are those it takes, within a factor of 4."""
    write(tmp_path / "in", rows=100_000, dim=64)
    expected = {stage.name: stage.seconds for stage in foresee(real(tmp_path)).stages}["encode"]
    opened = open_index_build(real(tmp_path))
    train(opened, StageLog())
    began = time.process_time()
    encode(opened)
    taken = time.process_time() - began

    assert taken / 4 < expected < taken * 4


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
def test_types_of_numbers(dtype, tmp_path):
    """An input's bytes are those of its numbers, whichever type they have."""
    write(tmp_path / "in", dtype=dtype)
    stages = {stage.name: stage for stage in foresee(real(tmp_path, kind="ivf-sq8")).stages}
    least = ROWS * DIM * np.dtype(dtype).itemsize

    assert least <= stages["encode"].read < 3 * least


KINDS = ["flat", "hnsw", "ivf-pq", "ivf-opq", "ivf-pq-fastscan", "ivf-rabitq:bits=1", "ivf-flat"]


@pytest.mark.parametrize(("kind", "metric"), [*((kind, "ip") for kind in KINDS), ("flat", "l2"), ("ivf-sq8", "l2")])
def test_every_kind(kind, metric, tmp_path):
    """Every kind is forecast, its empty index to 1 % of its true bytes."""
    write(tmp_path / "in", rows=4000)
    result = foresee(real(tmp_path, kind=kind, metric=metric))
    opened = open_index_build(real(tmp_path, kind=kind, metric=metric))
    train(opened, StageLog())

    assert result.trained == pytest.approx(len(opened.folder.read("trained.faiss")), rel=0.01)
    assert all(stage.seconds > 0 for stage in result.stages)


def test_no_room_here(tmp_path, monkeypatch):
    """Where no node has room for a stage, the forecast says so in the cluster's words, and prices the hours of cores."""

    def refused(options, weight_bytes):
        raise RunError("a worker needs about 44.0 GiB, and no node has as much")

    monkeypatch.setattr("lib.index.estimate.stages.WorkerRequest", refused)
    result = foresee(config(tmp_path, suppose="50000x16"))
    lines = "\n".join(to_lines(result, price_per_hour=1.0))

    assert clock_of(result.stages) is None
    assert "none here: a worker needs about 44.0 GiB" in lines
    assert "a core that is never idle" in lines


def test_more_workers_take_less_time(tmp_path, monkeypatch):
    """By the clock a stage takes as many rounds as its shards need, and never less than the driver's share."""
    (stage,) = [each for each in foresee(config(tmp_path, suppose="3000000x64")).stages if each.name == "encode"]

    assert stage.clock(1, 1) == pytest.approx(max(stage.seconds, 0.0015 * stage.shards))
    assert stage.clock(2, 1) <= stage.clock(1, 1)
    assert stage.clock(10**6, 1) == pytest.approx(max(stage.seconds / stage.shards, 0.0015 * stage.shards))


def test_refusals_of_the_build(tmp_path):
    """What the build would refuse, its forecast does: too small a sample, and a merge of a kind that cannot be merged."""
    with pytest.raises(InputError, match="too few for 256 lists"):
        forecast(config(tmp_path, suppose="100000x16", kind="ivf-sq8", lists=256, sample_rows=1000))
    with pytest.raises(UsageError, match="cannot merge"):
        forecast(config(tmp_path, suppose="100000x16", kind="ivf-pq-fastscan", merge=1))


def test_a_long_build_says_how_long_it_takes(tmp_path, monkeypatch):
    """Before it begins, and not again when it goes on; what cannot be reckoned does not end it."""
    monkeypatch.setattr("lib.index.build_job.ESTIMATED_NUMBERS", 1)
    messages = listen()
    write(tmp_path / "in")
    build(real(tmp_path))
    assert any("core hours by costs measured here; --dry-run tells them by stage" in sentence for sentence in messages)

    messages.clear()
    build(real(tmp_path))
    assert not any("core hours" in sentence for sentence in messages)

    def fail(estimator):
        raise InputError("no such stage")

    monkeypatch.setattr("lib.index.estimate.stages.Estimator.stages", property(fail))
    build(real(tmp_path, output=str(tmp_path / "other")))
    assert "how long it takes is not known: no such stage" in messages

"""The engine as a contract over its executors, apart from any model: shards that crash, fail, or cannot be read."""

import os
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lib.cli.progress import Progress
from lib.data.corpus import CorpusOptions
from lib.data.reader import read_rows
from lib.engine import dispatch, executor, ray_data
from lib.engine.executor import execute
from lib.engine.mapper import FusedMapper, Result
from lib.engine.parts import read_manifest
from lib.engine.planner import CorpusPlanner
from lib.engine.run import Run, missing
from lib.engine.workers import WorkerOptions, WorkerRequest
from lib.errors import ModelError, RunError, ShoalError, StorageError
from lib.storage.folder import Folder

ROWS, SHARD = 1000, 100


@dataclass(frozen=True)
class Upper:
    """A mapper without a model: the text in capitals. `trouble`: (step, first text of a shard) -> "die", or an exception."""

    columns: pa.Schema
    trouble: dict = field(default_factory=dict)
    unloadable: Exception | None = None

    def read(self, shard):
        rows = read_rows(shard, ["id", "text"], self.columns, {})
        self.meet("read", rows)
        return {"rows": rows}, {"read": 0.0}

    def load(self):
        if self.unloadable is not None:
            raise self.unloadable
        return self.compute

    def compute(self, tables):
        self.meet("compute", tables["rows"])
        return {"rows": tables["rows"].append_column("upper", pc.utf8_upper(tables["rows"]["text"]))}

    def to_result(self, shard, tables):
        self.meet("publish", tables["rows"])
        rows = tables["rows"].select(["id", "upper"])
        return Result(rows, {"source_rows": len(rows)})

    def meet(self, step, rows):
        """Have the trouble that waits for this shard at this step."""
        trouble = self.trouble.get((step, rows["text"][0].as_py()))
        if trouble == "die":
            os._exit(9)
        if trouble is not None:
            raise trouble


@dataclass(frozen=True)
class FusedUpper(FusedMapper, Upper):
    """The same in one call of the worker."""

    def load(self):
        compute = Upper.load(self)
        return lambda shard: self.to_result(shard, compute(self.read(shard)[0]))


@dataclass(frozen=True)
class Case:
    """An executor with a mapper that it takes."""

    executor: str
    mapper: type

    def request(self, **options):
        return WorkerRequest(WorkerOptions(executor=self.executor, **options))


LOCAL, LOCAL_FUSED = Case("local", Upper), Case("local", FusedUpper)
RAY_DATA, ACTOR_POOL = Case("ray", Upper), Case("ray", FusedUpper)
EXECUTORS = {"local": LOCAL, "local-fused": LOCAL_FUSED, "ray-data": RAY_DATA, "actor-pool": ACTOR_POOL}


@pytest.fixture(params=EXECUTORS.values(), ids=EXECUTORS)
def case(request):
    if request.param.executor == "ray":
        request.getfixturevalue("cluster")
    return request.param


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(ROWS), "text": [f"text {i}" for i in range(ROWS)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=250)
    return CorpusOptions(input=str(tmp_path / "in"), id_column="id")


def opened(case, corpus, tmp_path):
    folder = Folder(str(tmp_path / "out"))
    folder.probe()
    return Run.open(folder, {"job": "upper"}, CorpusPlanner(corpus, {}, lambda *_: SHARD, case.request()), {})


def executed(case, run, trouble=None, unloadable=None):
    pending = missing(run)
    mapper = case.mapper(run.columns, trouble or {}, unloadable)
    return execute(mapper, run, case.request().resolve(), Progress(len(pending)), pending)


def texts(tmp_path):
    return [t for part in sorted((tmp_path / "out").glob("part-*")) for t in pq.read_table(part)["upper"].to_pylist()]


def test_a_run_makes_every_part_and_the_manifest(case, corpus, tmp_path):
    """Rows out are rows in, in order; the manifest, written last, counts them; nothing unfinished is left."""
    outcome = executed(case, opened(case, corpus, tmp_path))

    assert texts(tmp_path) == [f"TEXT {i}" for i in range(ROWS)]
    assert sum(part.rows for part in read_manifest(Folder(str(tmp_path / "out")))) == ROWS
    assert outcome.quarantined == {}
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_a_failing_shard_is_quarantined_and_mended(case, corpus, tmp_path, monkeypatch):
    """A shard that raises each time is given up on with its reason and place; every other shard is done. Mended, the same
    command does the rest."""
    monkeypatch.setattr(executor, "ATTEMPTS", 2)
    outcome = executed(case, opened(case, corpus, tmp_path), {("publish", "text 600"): ValueError("odd value 17")})

    assert list(outcome.quarantined) == [6]
    assert "odd value 17" in outcome.quarantined[6]
    assert "test_executors.py" in outcome.quarantined[6]
    assert outcome.parts == []
    assert len(texts(tmp_path)) == ROWS - SHARD
    assert not (tmp_path / "out" / "_manifest.parquet").exists()
    assert "odd value 17" in (tmp_path / "out" / "_quarantine.json").read_text()

    assert executed(case, opened(case, corpus, tmp_path)).quarantined == {}
    assert texts(tmp_path) == [f"TEXT {i}" for i in range(ROWS)]
    assert (tmp_path / "out" / "_quarantine.json").read_text() == "{}"


@pytest.mark.parametrize("case", [ACTOR_POOL], ids=["actor-pool"])
def test_poison_shards_are_quarantined(cluster, case, corpus, tmp_path, monkeypatch):
    """A shard that kills its worker, or its reader, is given up on with its reason; every other shard is done."""
    monkeypatch.setattr(ray_data, "MAX_ACTOR_DEATHS", 1)  # a process takes seconds to start anew
    monkeypatch.setattr(dispatch, "MAX_ACTOR_DEATHS", 0)
    monkeypatch.setattr(executor, "ATTEMPTS", 2)
    trouble = {("compute", "text 0"): "die", ("read", "text 300"): "die"}
    outcome = executed(case, opened(case, corpus, tmp_path), trouble)

    assert sorted(outcome.quarantined) == [0, 3]
    assert all("died" in reason for reason in outcome.quarantined.values())
    assert len(texts(tmp_path)) == ROWS - 2 * SHARD
    assert (tmp_path / "out" / "_quarantine.json").read_text().count("died") >= 2


def test_an_error_that_a_person_can_mend_stops_the_run(case, corpus, tmp_path):
    """A ShoalError in a worker ends the run with its own message and class, not with a quarantine."""
    error = StorageError("the disk is full. Free space")
    with pytest.raises(StorageError, match="Free space"):
        executed(case, opened(case, corpus, tmp_path), {("publish", "text 500"): error})


def test_a_short_shard_is_not_published(case, corpus, tmp_path, monkeypatch):
    """Rows are counted against the plan before a part is published."""
    monkeypatch.setattr(executor, "ATTEMPTS", 1)
    run = opened(case, corpus, tmp_path)
    plan = run.plan.to_pylist()
    plan[2]["rows"] += 1
    outcome = executed(case, replace(run, plan=pa.Table.from_pylist(plan, run.plan.schema)))

    assert list(outcome.quarantined) == [2]
    assert "read 100 rows where the plan has 101" in outcome.quarantined[2]


@pytest.mark.parametrize("kind", [ModelError, RuntimeError])
def test_a_worker_that_cannot_load_ends_the_run(case, corpus, tmp_path, kind):
    """An error at a worker's start ends the run with its own message."""
    with pytest.raises(ShoalError, match="the weights are damaged") as raised:
        executed(case, opened(case, corpus, tmp_path), unloadable=kind("the weights are damaged"))

    assert raised.type is (ModelError if kind is ModelError else RunError)

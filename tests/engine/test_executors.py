"""The engine, apart from any model: shards that crash, fail, or cannot be read, and a cluster without room."""

import os
import time
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import lib.engine.dispatch
import lib.engine.executor
import lib.engine.workers
from lib.cli.progress import Progress
from lib.data.corpus import CorpusOptions
from lib.data.reader import read_rows
from lib.engine.executor import execute
from lib.engine.mapper import FusedMapper
from lib.engine.parts import publish_part, read_manifest
from lib.engine.run import audit, missing, open_ledger
from lib.engine.workers import WorkerOptions, WorkerPlan, plan_workers, with_current_nodes
from lib.errors import InputError, ModelError, RunError, ShoalError, StorageError, UsageError
from lib.storage.folder import Folder

ROWS, SHARD = 1000, 100


@dataclass(frozen=True)
class Upper:
    """A verb without a model: the text in capitals. `trouble` names a shard's first text and what befalls its worker."""

    columns: pa.Schema
    trouble: dict = field(default_factory=dict)

    def prepare(self, shard):
        rows = read_rows(shard, ["id", "text"], self.columns, {})
        self._befall("prepare", rows)
        return {"rows": rows}, {"read": 0.0}

    def worker(self):
        return self._work

    def _work(self, bundle):
        self._befall("work", bundle["rows"])
        return {"rows": bundle["rows"].append_column("upper", pc.utf8_upper(bundle["rows"]["text"]))}

    def finish(self, shard, bundle):
        self._befall("finish", bundle["rows"])
        rows = bundle["rows"].select(["id", "upper"])
        return rows, {"rows": len(rows), "source_rows": len(rows)}

    def _befall(self, place, rows):
        what = self.trouble.get((place, rows["text"][0].as_py()))
        if what == "die":
            os._exit(9)
        if what is not None:
            raise what


@dataclass(frozen=True)
class Itself(FusedMapper, Upper):
    """Its worker reads: the same process does all steps of a shard, or the shard fails."""

    def prepare(self, shard):
        bundle, seconds = super().prepare(shard)
        return {"rows": bundle["rows"].replace_schema_metadata({"pid": str(os.getpid())})}, seconds

    def finish(self, shard, bundle):
        if bundle["rows"].schema.metadata[b"pid"] != str(os.getpid()).encode():
            raise ValueError("another process has read this shard")
        return super().finish(shard, bundle)


@dataclass(frozen=True)
class Unloadable(Upper):
    """Its worker cannot be made."""

    error: Exception = field(default_factory=RuntimeError)

    def worker(self):
        raise self.error


@dataclass(frozen=True)
class UnloadableItself(FusedMapper, Unloadable):
    """Nor can that of a verb whose worker reads."""


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(ROWS), "text": [f"text {i}" for i in range(ROWS)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=250)
    return CorpusOptions(input=str(tmp_path / "in"), id_column="id")


def opened(corpus, tmp_path):
    folder = Folder(str(tmp_path / "out"))
    folder.probe()
    return open_ledger(folder, {"verb": "upper"}, corpus, {}, False, lambda _: SHARD, {})


def done(ledger, kind=Upper, **trouble):
    pending = missing(ledger)
    progress = Progress(len(pending))
    workers = plan_workers(WorkerOptions(), 0)
    return execute(kind(ledger.columns, trouble.get("trouble", {})), ledger, workers, progress, pending)


def texts(tmp_path):
    return [t for part in sorted((tmp_path / "out").glob("part-*")) for t in pq.read_table(part)["upper"].to_pylist()]


def test_a_run_makes_every_part_and_the_manifest(cluster, corpus, tmp_path):
    """Rows out are rows in, in order; the manifest, written last, counts them; nothing unfinished is left."""
    outcome = done(opened(corpus, tmp_path))

    assert texts(tmp_path) == [f"TEXT {i}" for i in range(ROWS)]
    assert sum(part.rows for part in read_manifest(Folder(str(tmp_path / "out")))) == ROWS
    assert outcome.quarantined == {}
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_a_resumed_run_does_only_what_is_missing(cluster, corpus, tmp_path):
    """Parts that are there are not made again; the manifest knows them from their footers as from receipts."""
    first = done(opened(corpus, tmp_path))
    folder = tmp_path / "out"
    kept = {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder) if name.startswith("part-")}
    gone = sorted(kept)[3:5]
    for name in [*gone, "_manifest.parquet"]:
        os.unlink(folder / name)

    ledger = opened(corpus, tmp_path)
    assert missing(ledger) == [3, 4]
    second = done(ledger)

    assert second.parts == first.parts  # checksums too
    assert all(os.stat(folder / n).st_mtime_ns == t for n, t in kept.items() if n not in gone)
    assert missing(opened(corpus, tmp_path)) == []


def test_poison_and_failing_shards_are_quarantined(cluster, corpus, tmp_path, monkeypatch):
    """A shard that kills its worker, its reader or its writer, or raises each time, is given up on with its reason;
    every other shard is done. Mended, the same command does the rest."""
    monkeypatch.setattr(lib.engine.executor, "DEATHS", 1)  # a process takes seconds to start anew
    monkeypatch.setattr(lib.engine.executor, "ATTEMPTS", 2)
    trouble = {
        ("work", "text 0"): "die",
        ("prepare", "text 300"): "die",
        ("finish", "text 600"): ValueError("odd value 17"),
    }
    outcome = done(opened(corpus, tmp_path), trouble=trouble)

    assert sorted(outcome.quarantined) == [0, 3, 6]
    assert "died" in outcome.quarantined[0]
    assert "odd value 17" in outcome.quarantined[6]
    assert "test_sharded.py" in outcome.quarantined[6]
    assert outcome.parts == []
    assert len(texts(tmp_path)) == ROWS - 3 * SHARD
    assert not (tmp_path / "out" / "_manifest.parquet").exists()
    assert (tmp_path / "out" / "_quarantine.json").read_text().count("died") == 2

    assert done(opened(corpus, tmp_path)).quarantined == {}
    assert texts(tmp_path) == [f"TEXT {i}" for i in range(ROWS)]
    assert (tmp_path / "out" / "_quarantine.json").read_text() == "{}"


def test_a_worker_that_reads_itself_does_the_whole_shard(cluster, corpus, tmp_path, monkeypatch):
    """All three steps in one process; a shard that kills it or fails is given up on with its reason, the others are done."""
    monkeypatch.setattr(lib.engine.dispatch, "DEATHS", 0)
    monkeypatch.setattr(lib.engine.executor, "ATTEMPTS", 2)
    trouble = {("prepare", "text 0"): "die", ("finish", "text 600"): ValueError("odd value 17")}
    outcome = done(opened(corpus, tmp_path), Itself, trouble=trouble)

    assert sorted(outcome.quarantined) == [0, 6]
    assert "died" in outcome.quarantined[0]
    assert "odd value 17" in outcome.quarantined[6]
    assert len(texts(tmp_path)) == ROWS - 2 * SHARD


def test_what_a_person_can_mend_stops_the_run(cluster, corpus, tmp_path):
    """A ShoalError in a worker ends the run with its own words and class, not with a quarantine."""
    error = StorageError("the disk is full. Free space")
    with pytest.raises(StorageError, match="Free space"):
        done(opened(corpus, tmp_path), trouble={("finish", "text 500"): error})


def test_a_short_shard_is_not_published(cluster, corpus, tmp_path, monkeypatch):
    """Rows are counted against the plan before a part is published."""
    monkeypatch.setattr(lib.engine.executor, "ATTEMPTS", 1)
    ledger = opened(corpus, tmp_path)
    plan = ledger.plan.to_pylist()
    plan[2]["rows"] += 1
    outcome = done(replace(ledger, plan=pa.Table.from_pylist(plan, ledger.plan.schema)))

    assert list(outcome.quarantined) == [2]
    assert "read 100 rows where the plan has 101" in outcome.quarantined[2]


def test_another_run_in_the_folder_is_refused(corpus, tmp_path):
    """A folder that holds a run with other settings is refused, and the settings that differ are named."""
    opened(corpus, tmp_path)
    with pytest.raises(RunError, match=r"verb: there 'upper', asked 'lower'"):
        open_ledger(Folder(str(tmp_path / "out")), {"verb": "lower"}, corpus, {}, False, lambda _: SHARD, {})


def test_parts_without_a_record_are_refused(corpus, tmp_path):
    """Parts that no _run.json explains are not overwritten or mixed in."""
    Folder(str(tmp_path / "out")).publish("part-000000-abc.parquet", b"x")
    with pytest.raises(RunError, match=r"no _run\.json"):
        opened(corpus, tmp_path)


def test_a_grown_corpus_costs_its_new_shards_only(corpus, tmp_path):
    """New files extend the plan; old shards keep number and name. A changed file is named."""
    before = opened(corpus, tmp_path)
    pq.write_table(pa.table({"id": [1], "text": ["new"]}), tmp_path / "in" / "b.parquet")
    after = opened(corpus, tmp_path)

    assert after.part_names().items() > before.part_names().items()
    assert len(after.part_names()) == len(before.part_names()) + 1

    for name in ("c.parquet", "d.parquet"):
        pq.write_table(pa.table({"id": [1], "text": [name]}), tmp_path / "in" / name)
        grown = opened(corpus, tmp_path)
    assert list(grown.part_names()) == list(range(13))
    assert len(set(grown.part_names().values())) == 13

    pq.write_table(
        pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}), tmp_path / "in" / "e.parquet"
    )
    opened(corpus, tmp_path)
    assert len([name for name in os.listdir(tmp_path / "out") if name.startswith("_plan")]) == 4

    pq.write_table(pa.table({"id": [1, 2], "text": ["new", "x"]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has changed"):
        opened(corpus, tmp_path)


def test_the_audit_names_what_is_missing(corpus, tmp_path):
    """No manifest while a shard is missing; a damaged part is named."""
    with pytest.raises(RunError, match="10 of 10 shards have no part"):
        audit(opened(corpus, tmp_path), {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cpus_per_worker": 64}, "no node has 57.6 CPU"),
        ({"gpus_per_worker": 1}, "no node has 1 GPU"),
        ({"min_workers": 500}, "room for"),
    ],
)
def test_a_cluster_without_room_is_told_at_once(cluster, options, said):
    """Ray Data would wait for ever without a word; the driver says what does not fit, and what to change."""
    began = time.monotonic()
    with pytest.raises(RunError, match=said):
        plan_workers(WorkerOptions(**options), 0)
    assert time.monotonic() - began < 5


def test_a_model_larger_than_the_nodes_is_told(cluster):
    """A worker that no node has the memory for is refused with both figures."""
    with pytest.raises(RunError, match="GiB"):
        plan_workers(WorkerOptions(), 10**13)


def test_on_a_cluster_that_grows_the_user_says_how_far(monkeypatch):
    """Where an autoscaler runs, what no present node has is no error, and the pool may grow to what was said; what its nodes
    will have Ray does not tell, so a command that does not say it is refused. Without one, what no node has is refused."""
    monkeypatch.setattr(lib.engine.workers, "_nodes", lambda labels=None: [{"CPU": 0.0}])
    monkeypatch.setattr(lib.engine.workers, "_grows", lambda: True)
    workers = plan_workers(
        WorkerOptions(max_workers=16, gpus_per_worker=1, worker_label=("ray.io/accelerator-type=L4",)), 0
    )
    assert (workers.minimum, workers.initial, workers.maximum, workers.gpus) == (1, 1, 16, 1)
    for options in (WorkerOptions(max_workers=16), WorkerOptions(gpus_per_worker=1)):
        with pytest.raises(UsageError, match="--max-workers, and --gpus-per-worker"):
            plan_workers(options, 0)

    monkeypatch.setattr(lib.engine.workers, "_grows", lambda: False)
    with pytest.raises(RunError, match="no node has 1 GPU"):
        plan_workers(WorkerOptions(gpus_per_worker=1, max_workers=16), 0)


def test_a_wave_starts_with_the_nodes_that_have_come(monkeypatch):
    """Of a pool that began with one worker, the next wave starts as many as the nodes of now have room for."""
    monkeypatch.setattr(lib.engine.workers, "_nodes", lambda labels=None: [{"CPU": 8.0, "GPU": 1.0}] * 5)
    one = WorkerPlan(minimum=1, initial=1, maximum=4, threads=1, cpus=1.0, gpus=1.0, task_cpus=1.0)

    assert with_current_nodes(one).initial == 4
    assert with_current_nodes(replace(one, maximum=16)).initial == 5


def test_no_more_workers_than_the_memory_and_the_tasks_allow(monkeypatch):
    """Workers of a large model stop at the node's memory; workers of a quarter GPU leave a CPU to the readers."""
    gib = 2.0**30
    monkeypatch.setattr(lib.engine.workers, "_nodes", lambda labels=None: [{"CPU": 16.0, "memory": 32 * gib}])
    assert plan_workers(WorkerOptions(cpus_per_worker=1), int(5 * gib)).maximum == 3  # of 9.5 GiB each

    monkeypatch.setattr(lib.engine.workers, "_nodes", lambda labels=None: [{"CPU": 4.0, "GPU": 1.0}])
    assert plan_workers(WorkerOptions(gpus_per_worker=0.25), 0).maximum == 3


@pytest.mark.parametrize("kind", [ModelError, RuntimeError])
def test_a_worker_that_cannot_load_is_told(cluster, corpus, tmp_path, kind):
    """What goes wrong in a worker's start ends the run with its own words."""
    ledger = opened(corpus, tmp_path)
    for verb in (Unloadable, UnloadableItself):
        broken = verb(ledger.columns, error=kind("the weights are damaged"))
        with pytest.raises(ShoalError, match="the weights are damaged"):
            execute(broken, ledger, plan_workers(WorkerOptions(), 0), Progress(1), missing(ledger))


def test_parts_go_to_the_folder_of_the_run_only(corpus, tmp_path):
    """A node that does not see the run's folder, and would fill one of its own, says so."""
    with pytest.raises(StorageError, match="shared file system"):
        publish_part(Folder(str(tmp_path / "elsewhere")), "part-0", 0, pa.table({"id": [1]}), {})


def test_more_workers_at_least_than_at_most_is_a_usage_error(cluster):
    """--min-workers over --max-workers is told."""
    with pytest.raises(UsageError, match="--min-workers 3"):
        plan_workers(WorkerOptions(min_workers=3, max_workers=2), 0)

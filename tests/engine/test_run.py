"""The folder of a run, without executing anything: config, plan, audit."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.data.corpus import CorpusOptions
from lib.engine.parts import read_facts, read_manifest
from lib.engine.planner import CorpusPlanner, FixedPlanner
from lib.engine.publish import publish_part
from lib.engine.run import Run, audit
from lib.engine.workers import WorkerOptions, WorkerRequest
from lib.errors import InputError, RunError, StorageError
from lib.storage.folder import Folder

ROWS, SHARD = 1000, 100
LOCAL = WorkerRequest(WorkerOptions(executor="local", gpus_per_worker=0))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(ROWS), "text": [f"text {i}" for i in range(ROWS)]})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=250)
    return CorpusOptions(input=str(tmp_path / "in"), id_column="id")


def opened(corpus, tmp_path, job="upper"):
    folder = Folder(str(tmp_path / "out"))
    folder.probe()
    return Run.open(folder, {"job": job}, CorpusPlanner(corpus, {}, lambda *_: SHARD, LOCAL), {})


def test_another_run_in_the_folder_is_refused(corpus, tmp_path):
    """A folder that holds a run with other settings is refused, and the settings that differ are named."""
    opened(corpus, tmp_path)
    with pytest.raises(RunError, match=r"job: there 'upper', asked 'lower'"):
        opened(corpus, tmp_path, job="lower")


def test_parts_without_a_run_config_are_refused(corpus, tmp_path):
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


def test_the_audit_names_missing_shards(corpus, tmp_path):
    """No manifest while a shard is missing."""
    run = opened(corpus, tmp_path)
    with pytest.raises(RunError, match="10 of 10 shards have no part"):
        audit(run, {})

    assert read_manifest(run.folder) == []


def test_a_fixed_plan_is_made_once(corpus, tmp_path):
    """A resumed run takes the stored plan; the function that makes it is not called again."""
    plan, columns = opened(corpus, tmp_path).plan, pa.schema([("text", pa.string())])
    calls = []

    def make():
        calls.append(1)
        return plan, columns

    runs = [Run.open(Folder(str(tmp_path / "b")), {"job": "b"}, FixedPlanner(make, LOCAL), {}) for _ in range(2)]

    assert len(calls) == 1
    assert runs[0].plan == runs[1].plan == plan
    assert runs[1].columns == columns


def test_parts_go_to_the_folder_of_the_run_only(tmp_path):
    """A node that does not see the run's folder, and would fill one of its own, says so."""
    with pytest.raises(StorageError, match="shared file system"):
        publish_part(Folder(str(tmp_path / "elsewhere")), "part-0", 0, pa.table({"id": [1]}), {})


def test_facts_and_row_groups_of_a_part(tmp_path):
    """Facts come back as they were published; groups become row groups, of which empty ones are left out."""
    folder = Folder(str(tmp_path))
    folder.publish("_run.json", b"{}")
    part = publish_part(folder, "part-0", 0, pa.table({"n": range(5)}), {"rows": 5}, {"seconds": 1.5}, [2, 0, 3])

    assert read_facts(folder, [part]) == [{"seconds": 1.5, "groups": [2, 0, 3]}]
    sizes = pq.ParquetFile(tmp_path / "part-0").metadata
    assert [sizes.row_group(i).num_rows for i in range(sizes.num_row_groups)] == [2, 3]


@pytest.mark.parametrize(
    ("new", "fits"), [(pa.int32(), True), (pa.int64(), True), (pa.float64(), False), (pa.string(), False)]
)
def test_new_files_have_the_types_of_the_plan(tmp_path, new, fits):
    """A grown input is refused where the planned type of a column does not hold the values of the new files."""
    (tmp_path / "in").mkdir()
    options = CorpusOptions(input=str(tmp_path / "in"), keep_columns=("k",), shard_rows=10)
    pq.write_table(pa.table({"text": ["a"], "k": pa.array([1], pa.int64())}), tmp_path / "in" / "0.parquet")
    first = CorpusPlanner(options, {}, lambda *_: 10, WorkerRequest(WorkerOptions()))
    run_config = first.describe()
    planned = first.plan(run_config)
    values = ["7"] if new == pa.string() else [7]
    pq.write_table(pa.table({"text": ["b"], "k": pa.array(values, new)}), tmp_path / "in" / "1.parquet")
    grown = CorpusPlanner(options, {}, lambda *_: 10, WorkerRequest(WorkerOptions()))

    if fits:
        assert grown.extension(run_config, planned).num_rows == 1
    else:
        with pytest.raises(InputError, match=r"column 'k' is .* in new files, and this run was planned with int64"):
            grown.extension(run_config, planned)

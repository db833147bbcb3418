"""The whole plan: the same command resumes it to the same bytes, another one is refused."""

import os

import pytest

from lib.engine.workers import WorkerOptions
from lib.errors import InputError, RunError, UsageError
from lib.storage.folder import Folder
from lib.training.data import job
from lib.training.data.job import DataOptions, plan
from tests.support.training_plans import LOCAL, content, files, pairs, steps, write

HALVES = (slice(0, 8), slice(-8, None))


def test_the_same_seed_gives_the_same_bytes(make_plan, small_buckets):
    """A plan depends on data, options and seed alone; another seed is another order, and each pass is drawn anew."""
    one, same, other = (make_plan({"a": pairs(100)}, f"out{i}", seed=s, epochs=2) for i, s in enumerate((1, 1, 2)))
    sources = [[row for batch in steps(each) for row in batch["source"].to_pylist()] for each in (one, other)]
    passages = [[str(row) for batch in steps(one)[s] for row in batch["passages"].to_pylist()] for s in HALVES]

    assert content(one) == content(same)
    assert sources[0] != sources[1]
    assert passages[0] != passages[1]
    assert set(passages[0]) - set(passages[1])  # other negatives, not only another order


def test_texts_and_pairs_make_one_plan(make_plan):
    """Two --data of different kinds; the group is of the pairs."""
    planned = make_plan({"texts": [{"text": f"t{i}"} for i in range(8)], "pairs": pairs(8)}, group=4)

    assert {batch["dataset"][0].as_py(): len(batch["passages"][0]) for batch in steps(planned)} == {
        "texts": 1,
        "pairs": 4,
    }


def test_lost_parts_are_made_again_with_the_same_bytes(make_plan, small_buckets):
    """Without a part of each map and the order, the same command makes them again."""
    planned = make_plan({"a": pairs(100)})
    before = files(planned)
    lost = [min(name for name in before if name.startswith(folder)) for folder in ("pairs-a", "batches", "order")]
    for name in lost:
        os.remove(os.path.join(planned.url, name))
    again = make_plan({"a": pairs(100)})

    assert files(again) == before
    assert again == planned


@pytest.mark.parametrize("change", [{"seed": 1}, {"group": 3}, {"epochs": 2}, {"weight": ("a=2",)}, {"max_steps": 1}])
def test_another_plan_in_the_same_place_is_refused(make_plan, change):
    """Options that change the plan are named, with both values."""
    make_plan({"a": pairs(30)})
    with pytest.raises(RunError, match="holds another run"):
        make_plan({"a": pairs(30)}, **change)


def test_a_corrected_command_runs_in_the_same_place(make_plan):
    """A mistake that the first map finds, such as too few rows for a batch, does not bind the folder to the wrong command."""
    with pytest.raises(InputError, match="Lower --batch to 5"):
        make_plan({"a": pairs(5)})
    assert make_plan({"a": pairs(5)}, global_batch=5).steps == 1


def test_changed_data_in_the_same_place_is_refused(make_plan, tmp_path):
    """A file that has changed since the plan, and a new one, are named by their entry."""
    make_plan({"a": pairs(30)})
    write(tmp_path / "a.jsonl", pairs(31))
    with pytest.raises(RunError, match=r"holds another run .*files of a"):
        make_plan({"a": pairs(31)})
    with pytest.raises(RunError, match=r"holds another run .*data"):
        make_plan({"a": pairs(31), "b": pairs(30)})


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"data": ()}, "no --data"),
        ({"data": ("x/a.jsonl", "y/a.parquet")}, "two --data are named 'a': x/a.jsonl and y/a.parquet"),
        ({"data": ("b d=x",)}, "'b d' is no name"),
        ({"data": ("a=",)}, "has no URL"),
        ({"data": ("x",), "weight": ("x",)}, "--weight 'x' is not NAME=NUMBER"),
        ({"data": ("x",), "weight": ("x=0",)}, "a number above 0"),
        ({"data": ("x",), "weight": ("x=inf",)}, "a number above 0"),
        ({"data": ("x",), "weight": ("x=1", "x=2")}, "names 'x' twice"),
        ({"data": ("x",), "global_batch": 0}, "--global-batch 0 is out of range: give 1 to 65,536"),
        ({"data": ("x",), "group": 0}, "--group 0 is out of range: give 1 or more"),
        ({"data": ("x",), "max_steps": 0}, "--max-steps 0 is out of range"),
    ],
)
def test_a_wrong_command_is_refused_at_once(tmp_path, options, wanted):
    """A value that no data could make right is refused before any file is looked at."""
    with pytest.raises(UsageError, match=wanted):
        plan(DataOptions(**({"global_batch": 8, "group": 2} | options)), Folder(str(tmp_path)), LOCAL)


def test_a_weight_of_unknown_data_is_refused(make_plan, tmp_path):
    """A name that is no entry is refused at once; with a dataset column, as soon as the datasets are known, with their names."""
    with pytest.raises(UsageError, match=r"names 'nli', which is no --data.* Choose from: a"):
        make_plan({"a": pairs(30)}, weight=("nli=2",))
    with pytest.raises(UsageError, match="Choose from: b, qa"):
        make_plan({"b": pairs(30, dataset="qa")}, weight=("nli=2",))
    with pytest.raises(InputError, match="nothing at"):
        plan(DataOptions(data=(str(tmp_path / "no"),), global_batch=8, group=1), Folder(str(tmp_path / "o")), LOCAL)


def test_both_maps_run_on_cpus(make_plan, monkeypatch):
    """The maps of a training on GPUs request workers without a GPU, on the same nodes, and as many at most."""
    requests, run_job = [], job.run_job

    def recording(one, folder, planner):
        requests.append((one.settings["job"], planner.workers.options))
        return run_job(one, folder, planner)

    monkeypatch.setattr(job, "run_job", recording)
    workers = WorkerOptions(
        executor="local", gpus_per_worker=1.0, cpus_per_worker=2.0, max_workers=3, worker_label=("a=b",)
    )
    assert make_plan({"a": pairs(16)}, workers=workers).steps == 2
    assert requests == [("partition pairs", workers.on_cpus()), ("make batches", workers.on_cpus())]
    assert workers.on_cpus().gpus_per_worker == 0.0

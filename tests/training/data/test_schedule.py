"""The order of the steps: epochs, passes and weights."""

import json
import os
from collections import Counter

import pyarrow.parquet as pq
import pytest

from lib.engine.parts import FACTS
from lib.training.data.schedule import Stream, make_order
from tests.support.training_plans import files, pairs, steps


def test_a_batch_is_one_row_group_and_the_order_has_each_once(make_plan):
    """Steps are numbered without a gap, each names a row group of its own, and a row group is exactly a global batch."""
    planned = make_plan({"a": pairs(50), "b": pairs(40, 100)})
    order = pq.read_table(os.path.join(planned.url, "order.parquet"))
    groups = 0
    for name in set(order["part"].to_pylist()):
        metadata = pq.read_metadata(os.path.join(planned.url, name))
        assert {metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)} == {8}
        groups += metadata.num_row_groups

    assert planned.steps == order.num_rows == groups == 6 + 5
    assert order["step"].to_pylist() == list(range(11))
    assert len(set(zip(order["part"].to_pylist(), order["group"].to_pylist(), strict=True))) == 11
    for step, batch in enumerate(steps(planned)):
        assert set(batch["dataset"].to_pylist()) == {order["dataset"][step].as_py()}


@pytest.mark.parametrize(("weight", "epochs", "each"), [("2", 2, 8), ("0.5", 3, 2), ("1.5", 2, 6), ("0.25", 1, 1)])
def test_a_weight_is_how_often_an_epoch_goes_through_a_dataset(make_plan, weight, epochs, each):
    """An epoch has weight times a pass's batches, and goes on where the last one ended: all rows come equally often."""
    planned = make_plan({"a": pairs(32), "b": pairs(16, 100)}, weight=(f"a={weight}",), epochs=epochs)
    order = pq.read_table(os.path.join(planned.url, "order.parquet"))["dataset"].to_pylist()
    length = each + 2

    assert planned.steps == epochs * length
    for epoch in range(epochs):
        assert Counter(order[epoch * length : (epoch + 1) * length]) == {"a": each, "b": 2}
    times = Counter(row["source"] for batch in steps(planned) for row in batch.to_pylist() if row["dataset"] == "a")
    assert max(times.values()) - (min(times.values()) if len(times) == 32 else 0) <= 1


def test_the_order_is_cut_to_the_most_steps(make_plan):
    """--max-steps ends the plan."""
    assert make_plan({"a": pairs(50)}, max_steps=4, epochs=3).steps == 4


def test_an_epoch_is_whole_before_the_next_begins():
    """Every batch of a pass comes once in its epoch, in another order each time."""
    stream = Stream("a", "a", True, 1.0)
    for number in range(2):
        stream.add(number, number, range(40))
    order = make_order([stream], ["x", "y"], 2, 0, None)
    groups = order["group"].to_pylist()

    assert order["part"].to_pylist() == ["x"] * 40 + ["y"] * 40
    assert sorted(groups[:40]) == sorted(groups[40:]) == list(range(40))
    assert groups[:40] != groups[40:]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"max_steps": 2}, 1),
        ({"max_steps": 4}, 2),  # an epoch would be 4 steps if every row had a batch, and is 3
        ({"max_steps": 9}, 3),
        ({"max_steps": 1000}, 5),
        ({"max_steps": 5, "weight": ("a=0.5",)}, 2),
        ({"max_steps": 3, "weight": ("a=2",)}, 2),
    ],
)
def test_only_passes_that_the_steps_need_are_made(make_plan, small_buckets, options, passes):
    """With --max-steps, epochs after the last step are not made; the steps are those of the plan that is not cut."""
    rows = {"a": pairs(33)}
    cut = make_plan(rows, epochs=5, **options)
    uncut = make_plan(rows, "uncut", epochs=5, **options | {"max_steps": None})
    names = [name for name in files(cut) if name.startswith("batches")]
    numbers = [json.loads(pq.read_metadata(os.path.join(cut.url, name)).metadata[FACTS])["pass"] for name in names]

    assert set(numbers) == set(range(passes))
    assert cut.steps == min(options["max_steps"], uncut.steps)
    assert steps(cut) == steps(uncut)[: cut.steps]
    assert cut.counts == uncut.counts


def test_passes_are_made_until_the_steps_are_enough(make_plan):
    """Where rows in each other's way fill fewer batches than there would be, more passes follow; the command resumes all."""
    rows = {"a": [{"query": f"q{i}", "pos": f"p{i // 3 if i < 24 else i}"} for i in range(40)]}
    options = {"epochs": 9, "group": 1, "max_steps": 10}
    cut, uncut = make_plan(rows, **options), make_plan(rows, "uncut", **options | {"max_steps": None})
    folders = sorted(name for name in os.listdir(cut.url) if name.startswith("batches"))
    before = files(cut)
    os.remove(os.path.join(cut.url, max(before)))
    os.remove(os.path.join(cut.url, next(name for name in before if name.startswith(folders[-1]))))

    assert folders[0] == "batches-0"
    assert len(folders) > 1
    assert cut.steps == 10 < uncut.steps
    assert steps(make_plan(rows, **options)) == steps(uncut)[:10]
    assert files(cut) == before

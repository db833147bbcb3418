"""A plan that is read step by step, by several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lib.errors import RunError
from lib.training.data.batch_reader import BatchReader
from tests.support.training_plans import pairs, steps


def test_threads_may_read_the_plan_and_few_parts_stay_open(make_plan, small_buckets):
    """Steps read by two threads at a time are those read alone, whatever part they lie in."""
    planned = make_plan({"a": pairs(400)})
    alone, reader = steps(planned), BatchReader(planned.url)
    with ThreadPoolExecutor(2) as threads:
        shared = list(threads.map(reader.read, range(reader.steps)))

    assert all(one.equals(other) for one, other in zip(shared, alone, strict=True))
    assert len(reader._open) == 8
    with pytest.raises(IndexError, match=f"step {reader.steps} of a plan of {reader.steps}"):
        reader.read(reader.steps)


def test_an_unfinished_plan_cannot_be_read(tmp_path):
    """A folder without an order says what to do."""
    with pytest.raises(RunError, match=r"not finished\. Start its command again"):
        BatchReader(str(tmp_path))

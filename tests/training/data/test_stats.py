"""Counts of a plan, and refusals of data that cannot be trained on."""

import pytest

from lib.errors import InputError
from tests.support.training_plans import pairs

ERRORS = {
    "fewer rows than a batch": (
        pairs(5),
        "a gives no batch: a global batch is 8 rows .*it has 5 usable.*Lower --batch to 5",
    ),
    "small datasets": (
        [*pairs(5, dataset="x"), *pairs(6, 10, dataset="y")],
        "the largest of its 2 datasets has 6 usable rows",
    ),
    "texts in each other's way": (
        [{"query": "q", "pos": f"p{i}"} for i in range(20)],
        "a gives no batch: of its 20 usable rows",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_data_that_fills_no_batch_is_refused(make_plan, name):
    """Data that fills no batch is refused, with its numbers."""
    rows, wanted = ERRORS[name]
    with pytest.raises(InputError, match=wanted):
        make_plan({"a": rows})


def test_an_entry_without_a_usable_row_says_the_commonest_reasons(make_plan, monkeypatch):
    """The reasons with counts and the first source of each, also where the first rows looked well."""
    monkeypatch.setattr("lib.training.data.sources._look", lambda entry, storage: None)
    rows = [{"query": "", "pos": "p"}] * 5 + [{"query": "q", "pos": []}] * 2
    with pytest.raises(
        InputError, match=r"none of its 7 rows .*5 rows: empty query \(first a.jsonl#0\); 2 rows: no posit"
    ):
        make_plan({"a": rows})


def test_a_dataset_column_separates_datasets(make_plan):
    """Every batch is of one dataset, each dataset is whole in one bucket, and one too small for a batch is named, not fatal."""
    rows = pairs(20, dataset="nli") + pairs(17, 100, dataset="qa") + pairs(3, 200, dataset="tiny") + pairs(8, 300)
    counts = make_plan({"mix": rows}, weight=("nli=2",)).counts

    assert {name: (each.rows, each.batches) for name, each in counts.datasets.items()} == {
        "mix": (8, 1),
        "nli": (20, 2),
        "qa": (17, 2),
        "tiny": (3, 0),
    }
    assert counts.notes == ("dataset tiny gives no batch: it has 3 usable rows, and a global batch takes 8",)

"""Matryoshka: gathers and its record."""

import json

from torch import Tensor

from lib.training.losses import describe, parse
from lib.training.losses.matryoshka import Matryoshka
from tests.support.loss_cases import DIM, GROUP, ROWS, random_case


def test_matryoshka_gathers_once():
    """Queries and passages must be gathered once each for all lengths. The record must contain that of the inner loss."""
    calls = []
    loss, case = Matryoshka(parse(("gte", "infonce")), (6, 4, 2), (1.0, 1.0, 1.0)), random_case()

    def gather(local: Tensor) -> Tensor:
        calls.append(local.shape)
        return local

    loss(case.batch(loss, gather=gather))
    assert len(calls) == 2
    assert set(calls) == {(ROWS, DIM), (ROWS, GROUP, DIM)}
    record = json.loads(json.dumps(describe(loss)))
    assert (record["loss"], record["dims"]) == ("matryoshka", [6, 4, 2])
    assert [each["loss"] for each in record["inner"]["sum"]] == ["gte", "infonce"]

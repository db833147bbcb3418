"""Embedding losses equal their formulas. A new embedding loss needs its plain reference in tests/support/plain_losses.py."""

from dataclasses import replace

import pytest
import torch

from lib.training.losses import EMBEDDING, names
from lib.training.losses.cosent import CoSENT
from tests.support.loss_cases import EXACT, GROUP, ROWS, assert_same, gradients, loss_of, random_case
from tests.support.plain_losses import PLAIN

LOSSES = [
    *PLAIN,
    "infonce:margin=0.02,weight=0.5",
    "infonce:margin=-0.05,temperature=0.05",
    "focal-infonce:gamma=0.5",
    "hardness-infonce:alpha=5,temperature=0.1",
    "self-normalised:beta=7",
    "gte:temperature=0.05,weight=3",
    "cosent:temperature=0.1,weight=0.04",
    "kl:temperature=0.5,teacher_temperature=0.1",
    "margin-mse:scale=20",
    "m3-unified:share=0,weight=2",
]


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("text", LOSSES)
def test_embedding_losses_equal_their_formulas(text, in_batch, duplicates):
    """Value and gradients must equal the plain reference in float64, with hard negatives and a learned logit scale, with and
    without in-batch negatives, with and without duplicates."""
    loss, case = loss_of(text), random_case(in_batch, duplicates)
    assert_same(loss(case.batch(loss)), PLAIN[text.partition(":")[0]](case, loss), case.leaves, **EXACT)


def test_every_embedding_loss_has_its_plain_reference():
    """Every embedding loss in lib/training/losses must be in PLAIN."""
    assert {name for name in names() if loss_of(name).kind == EMBEDDING} == set(PLAIN)


def test_cosent_of_equal_labels_is_zero():
    """CoSENT must be 0, with zero gradients, where all rows have the same label."""
    loss, case = CoSENT(), random_case()
    case.keys = replace(case.keys, teacher=torch.ones(ROWS, GROUP))
    value = loss(case.batch(loss))
    assert value == 0
    assert not any(each.any() for each in gradients(value, case.leaves))

"""Losses on the command line: names, parameters, and data that a loss refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lib.errors import InputError, UsageError
from lib.training.losses import Batch, Scores, Sum, parse
from lib.training.losses.cosent import CoSENT
from lib.training.losses.focal_infonce import FocalInfoNCE
from lib.training.losses.infonce import InfoNCE
from lib.training.losses.m3_unified import M3Unified
from lib.training.losses.margin_mse import MarginMSE
from tests.support.loss_cases import EXACT, loss_of, random_case


def test_names_and_parameters():
    """Names and parameters must be parsed, several losses added, and unknown names refused with the choices."""
    assert parse(("infonce:temperature=0.05,margin=0.1,weight=0.5",)) == InfoNCE(0.05, 0.1, 0.5)
    assert parse(("focal_infonce",)) == FocalInfoNCE()
    both, case = parse(("infonce", "cosent:weight=0.04")), random_case()
    assert both == Sum((InfoNCE(), CoSENT(weight=0.04)))
    torch.testing.assert_close(both(case.batch(both)), sum(each(case.batch(each)) for each in both.losses), **EXACT)
    for text, word in (("nce", "infonce"), ("gte:tau=1", "temperature"), ("gte:temperature=x", "float")):
        with pytest.raises(UsageError, match=word):
            parse((text,))
    with pytest.raises(UsageError, match="one kind"):
        parse(("infonce", "listwise"))
    with pytest.raises(UsageError, match="matryoshka"):
        parse(("matryoshka",))


@pytest.mark.parametrize("name", ["cosent", "kl", "margin-mse", "listwise-kl", "score-margin-mse"])
def test_losses_that_need_scores_refuse_data_without_scores(name):
    """The error must name the columns that the dataset lacks."""
    loss, case = loss_of(name), random_case()
    case.keys = replace(case.keys, teacher=None)
    with pytest.raises(InputError, match="pos_scores"):
        loss(case.batch(loss))


def test_other_data_that_losses_refuse():
    """Margins without negatives, raw scores for bce, and m3-unified without token outputs must each be refused."""
    case = random_case()
    no_negatives = replace(case.keys, passage_keys=case.keys.passage_keys[:, :1], teacher=case.keys.teacher[:, :1])
    with pytest.raises(InputError, match="negatives"):
        MarginMSE()(Batch(no_negatives, case.queries, case.passages[:, :1], lambda local: local))
    with pytest.raises(InputError, match="from 0 to 1"):
        loss_of("bce")(Scores(replace(case.keys, teacher=8 * case.keys.teacher), case.scores))
    with pytest.raises(InputError, match="BGE-M3"):
        M3Unified()(Batch(case.keys, case.queries, case.passages, lambda local: local))


def test_parsing_does_not_import_torch():
    """Importing `lib.training.losses`, and parsing and describing all losses, must not import torch."""
    program = "import sys; from lib.training.losses import names, parse, describe; "
    program += "[describe(parse((name,))) for name in names()]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

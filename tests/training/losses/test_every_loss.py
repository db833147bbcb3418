"""Properties of every loss. A new file in lib/training/losses is tested without a change here."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lib.training.losses import EMBEDDING, RERANKING, Batch, describe, names
from lib.training.losses.infonce import InfoNCE
from tests.support.loss_cases import CLOSE, EXACT, assert_same, gradients, loss_of, random_case


@pytest.mark.parametrize("name", names())
def test_every_loss_runs(name):
    """With its defaults a loss must give a float32 scalar, finite gradients that are not all zero, and a record as JSON. Doubling
    its weight must double it."""
    loss, case = loss_of(name), random_case(dtype=torch.float32)
    value = loss(case.batch(loss))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    computed = gradients(value, case.leaves)
    assert all(each.isfinite().all() for each in computed)
    assert any(each.any() for each in computed)
    assert json.loads(json.dumps(describe(loss)))["loss"] == name
    torch.testing.assert_close(replace(loss, weight=2 * loss.weight)(case.batch(loss)), 2 * value)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("world", [2, 4])
def test_loss_does_not_depend_on_the_number_of_ranks(name, world):
    """The mean of the ranks' values, and its gradients, must equal the loss of one rank with all rows."""
    if name == "m3-unified":
        pytest.skip("its softmax is over the passages of one rank, as published")
    loss, case = loss_of(name), random_case()
    barrier, local_tensors = threading.Barrier(world), [None] * world

    def gather(rank: int, local: Tensor) -> Tensor:
        local_tensors[rank] = local
        barrier.wait(timeout=60)
        gathered = torch.cat(local_tensors)
        barrier.wait(timeout=60)
        return gathered

    def value(rank: int) -> Tensor:
        return loss(case.batch(loss, rank, world, partial(gather, rank)))

    with ThreadPoolExecutor(world) as pool:
        values = torch.stack(list(pool.map(value, range(world))))
    assert_same(values.mean(), loss(case.batch(loss)), case.leaves, **EXACT)
    if name == "cosent":
        torch.testing.assert_close(values, values[:1].expand(world), **EXACT)


@pytest.mark.parametrize("name", [name for name in names() if loss_of(name).kind == EMBEDDING])
@pytest.mark.parametrize("in_batch", [True, False])
def test_rows_without_negatives_give_no_nan(name, in_batch):
    """Loss and gradients must be finite where every passage is a positive of every row; InfoNCE's must be 0."""
    loss, case = loss_of(name), random_case(in_batch)
    keys = torch.zeros_like(case.keys.passage_keys)
    case.keys = replace(case.keys, passage_keys=keys, positive_keys=keys[:, :1])
    value = loss(case.batch(loss))
    assert value.isfinite()
    assert all(each.isfinite().all() for each in gradients(value, case.leaves))
    if name in ("infonce", "focal-infonce", "hardness-infonce", "self-normalised", "classification"):
        assert value == 0


def test_embedding_losses_compute_in_float32():
    """Cosines, scale and loss of bfloat16 vectors must be computed in float32."""
    loss, case = InfoNCE(temperature=0.03), random_case()
    half = [each.detach().to(torch.bfloat16) for each in (case.queries, case.passages)]
    actual = loss(Batch(case.keys, *half, lambda local: local))
    expected = loss(Batch(case.keys, *(each.double() for each in half), lambda local: local))
    torch.testing.assert_close(actual.double(), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in names() if loss_of(name).kind == RERANKING])
def test_reranking_losses_compute_in_float32(name):
    """The loss of bfloat16 scores must equal that of the same numbers in float64, within float32's precision."""
    loss, case = loss_of(name), random_case()
    case.scores = case.scores.detach().to(torch.bfloat16)
    actual, case.scores = loss(case.batch(loss)), case.scores.double()
    torch.testing.assert_close(actual.double(), loss(case.batch(loss)), **CLOSE)

"""A training step has the gradients of one big batch: at any number of ranks, in any chunks, however it is wrapped."""

from functools import cache

import pytest

from lib.training import losses
from lib.training.losses import EMBEDDING, RERANKING
from tests.support import ranks, tiny
from tests.support.ranks import Case

NAMES = [name for name in losses.names() if name != "retromae"]
KINDS = {name: losses.parse((name,)).of for name in NAMES}
TIGHT, SINGLE = 1e-12, 5e-6  # relative, in float64 and float32
SHARED = [(1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")]
EXACT = [Case(name, world, kind) for name in [*NAMES, "matryoshka"] for world, kind in SHARED]
EXACT += [Case("infonce", world, budget=10_000) for world in (1, 2, 4)]
EXACT += [Case("infonce", 3), Case("gte", 3, "fsdp")]  # ranks with two slices and with one
FLOAT32 = [
    Case(name, world, kind, double=False)
    for name in ("infonce", "gte", "listwise", "retromae")
    for world, kind in SHARED
]
BROKEN = [Case("infonce:temperature=0.5", 2, broken=mistake) for mistake in ("no replay", "detached", "no factor")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build("bert", tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    return ranks.run([*EXACT, *FLOAT32, *BROKEN], tmp_path_factory.mktemp("ranks"), model)


@cache
def plain(loss, budget, double, model):
    return ranks.plain(Case(loss, budget=budget, double=double), model)


def distance(case, found, model):
    """Of the gradients, relative to the norm of the plain ones; and of the loss."""
    value, expected = plain(case.loss, case.budget, case.double, model)
    given = found[case.name]
    return float((given["gradients"] - expected).norm() / expected.norm()), abs(given["loss"] - value) / abs(value)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_gradients_are_those_of_one_big_batch(case, found, model):
    """With dropout and hard negatives, in chunks of 40 tokens and in one: within 1e-12 in float64."""
    assert max(distance(case, found, model)) < TIGHT


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_gradients_in_float32(case, found, model):
    """Within 5e-6 in float32."""
    assert max(distance(case, found, model)) < SINGLE


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.broken)
def test_mistakes_would_be_seen(case, found, model):
    """Dropout that is not drawn again, remote passages without a gradient, a missing factor: each is far off."""
    assert distance(case, found, model)[0] > 0.01


@pytest.mark.parametrize(
    ("name", "gathers"),
    [("infonce", 1), ("gte", 2), ("matryoshka", 1), ("cosent", 1), ("classification", 0), ("listwise", 0)],
)
def test_collectives_are_few(name, gathers, found):
    """One gather and one reduce-scatter a tensor, however many chunks, and one reduction of the gradients."""
    counted = found[Case(name, 4, "ddp").name]["counted"]

    assert counted.get("all_gather_into_tensor", 0) == gathers
    assert counted.get("reduce_scatter_tensor", 0) == gathers
    assert counted["gradient reductions"] == 1


def test_every_kind_of_loss_is_tried():
    """Losses of vectors and of scores both are among the cases."""
    assert set(KINDS.values()) == {EMBEDDING, RERANKING}
    assert {case.loss for case in [*EXACT, *FLOAT32]} >= set(losses.names())

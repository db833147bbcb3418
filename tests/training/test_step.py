"""A training step has the gradients of one large batch, at any number of ranks, in chunks of any size, under DDP and FSDP2."""

from functools import cache

import pytest

from lib.training import losses
from lib.training.losses import EMBEDDING, RERANKING
from tests.support import ranks, tiny
from tests.support.ranks import Case

NAMES = [name for name in losses.names() if name != "retromae"]
KINDS = {name: losses.parse((name,)).kind for name in NAMES}
TIGHT, SINGLE = 1e-12, 5e-6  # relative, in float64 and float32
SHARED = [(1, "ddp"), (2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")]
EXACT = [Case(name, world, kind) for name in [*NAMES, "matryoshka"] for world, kind in SHARED]
EXACT += [Case("infonce", world, budget=10_000) for world in (1, 2, 4)]
EXACT += [Case("infonce", 3), Case("gte", 3, "fsdp")]  # one rank with two virtual ranks, two with one
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
def results(model, tmp_path_factory):
    return ranks.run([*EXACT, *FLOAT32, *BROKEN], tmp_path_factory.mktemp("ranks"), model)


@cache
def plain(loss, budget, double, model):
    return ranks.plain(Case(loss, budget=budget, double=double), model)


def distance(case, results, model):
    """Relative error of the gradients, by their norm, and of the loss."""
    value, expected = plain(case.loss, case.budget, case.double, model)
    result = results[case.name]
    return float((result["gradients"] - expected).norm() / expected.norm()), abs(result["loss"] - value) / abs(value)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_gradients_are_those_of_one_big_batch(case, results, model):
    """Gradients and loss must be within 1e-12 in float64, with dropout and hard negatives, in chunks of 40 tokens and in one."""
    assert max(distance(case, results, model)) < TIGHT


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_gradients_in_float32(case, results, model):
    """Gradients and loss must be within 5e-6 in float32."""
    assert max(distance(case, results, model)) < SINGLE


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.broken)
def test_mistakes_are_detected(case, results, model):
    """The comparison must fail for other dropout in the second pass, detached remote passages, and a missing world factor."""
    assert distance(case, results, model)[0] > 0.01


@pytest.mark.parametrize(
    ("name", "gathers"),
    [("infonce", 1), ("gte", 2), ("matryoshka", 1), ("cosent", 1), ("classification", 0), ("listwise", 0)],
)
def test_collectives_are_few(name, gathers, results):
    """A step must use one all-gather and one reduce-scatter a tensor and one gradient reduction, whatever its number of chunks."""
    counted = results[Case(name, 4, "ddp").name]["counted"]

    assert counted.get("all_gather_into_tensor", 0) == gathers
    assert counted.get("reduce_scatter_tensor", 0) == gathers
    assert counted["gradient reductions"] == 1


def test_every_loss_is_a_case():
    """The cases must cover every loss, of vectors and of scores."""
    assert set(KINDS.values()) == {EMBEDDING, RERANKING}
    assert {case.loss for case in [*EXACT, *FLOAT32]} >= set(losses.names())

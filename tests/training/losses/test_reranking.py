"""Reranking losses equal their formulas and those of sentence-transformers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.loss_cases import CLOSE, EXACT, GROUP, ROWS, Case, assert_same, loss_of, random_case


def st_reranker(name: str, case: Case, labels, inputs, **options) -> Tensor:
    """The value of a sentence-transformers loss for a model that returns the case's scores, whatever the texts."""
    from sentence_transformers.cross_encoder import CrossEncoder
    from sentence_transformers.cross_encoder import losses as theirs

    batches = iter([case.scores.flatten()] if len(inputs) == 2 else case.scores.T)

    class FixedScores(CrossEncoder):
        num_labels, device = 1, torch.device("cpu")

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def preprocess(self, pairs, **_):
            return {}

        def forward(self, features, **_):
            return {"scores": next(batches)}

    return getattr(theirs, name)(FixedScores(), **options)(inputs, labels)


LISTS = [["q"] * ROWS, [["p"] * GROUP] * ROWS]
ONE_HOT = torch.zeros(ROWS, GROUP).index_fill(1, torch.tensor(0), 1.0)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("ranknet", "RankNetLoss", {"reduction_log": "natural"}),
        ("lambdaloss", "LambdaLoss", {}),
        ("bce", "BinaryCrossEntropyLoss", {}),
    ],
)
def test_graded_losses_of_sentence_transformers(name, theirs, options, graded):
    """Value and gradients must equal sentence-transformers', for the teacher's grades and for positive and negatives."""
    loss, case = loss_of(name), random_case()
    labels = case.keys.teacher if graded else ONE_HOT
    case.keys = replace(case.keys, teacher=labels if graded else None)
    if name == "bce":
        expected = st_reranker(theirs, case, labels.flatten().double(), [["q"] * ROWS * GROUP, ["p"] * ROWS * GROUP])
    else:
        expected = st_reranker(theirs, case, list(labels), LISTS, mini_batch_size=-1, **options)
    torch.testing.assert_close(loss(case.batch(loss)), expected.double(), **CLOSE)
    actual, reference = (torch.autograd.grad(each, case.scores)[0] for each in (loss(case.batch(loss)), expected))
    torch.testing.assert_close(actual, reference, **CLOSE)


def test_ranknet_and_lambdaloss_equal_their_formulas():
    """Value and gradients must equal the sum over pairs, in float64."""
    case = random_case()
    labels, scores = case.keys.teacher.tolist(), case.scores
    ranks = (scores[:, None, :] > scores[:, :, None]).sum(2) + 1
    sums, pairs = {"ranknet": 0.0, "lambdaloss": 0.0}, 0
    for row in range(ROWS):
        best = sum(
            (2**y - 1) / torch.log2(torch.tensor(2.0 + n).double()) for n, y in enumerate(sorted(labels[row])[::-1])
        )
        for i in range(GROUP):
            for j in range(GROUP):
                if labels[row][i] > labels[row][j]:
                    pairs += 1
                    pair_loss = (1 + (scores[row, j] - scores[row, i]).exp()).log()
                    inverse = [1 / torch.log2(1 + rank.double()) for rank in (ranks[row, i], ranks[row, j])]
                    distance = (ranks[row, i] - ranks[row, j]).abs().double()
                    step = 1 / torch.log2(1 + distance) - 1 / torch.log2(2 + distance)
                    gain = (2 ** labels[row][i] - 2 ** labels[row][j]) / best
                    sums["ranknet"] += pair_loss
                    weight = gain * (10 * step + (inverse[0] - inverse[1]).abs())
                    sums["lambdaloss"] += weight * pair_loss / torch.log(torch.tensor(2.0).double())
    for name, total in sums.items():
        loss = loss_of(name)
        assert_same(loss(case.batch(loss)), total / pairs, case.leaves, **EXACT)


def test_listwise_losses_of_sentence_transformers():
    """Listwise losses must equal ListNet's cross entropy: with the positive as target, and, minus the teacher's entropy, with the
    teacher as target."""
    case = random_case()
    for name, labels in (("listwise", 1000 * ONE_HOT), ("listwise-kl", case.keys.teacher)):
        loss, teacher = loss_of(name), labels.softmax(1)
        entropy = -torch.xlogy(teacher, teacher).sum(1).mean()
        expected = st_reranker("ListNetLoss", case, list(labels), LISTS, mini_batch_size=-1) - entropy
        torch.testing.assert_close(loss(case.batch(loss)), expected.double(), **CLOSE)
        actual, reference = (torch.autograd.grad(each, case.scores)[0] for each in (loss(case.batch(loss)), expected))
        torch.testing.assert_close(actual, reference, **CLOSE)


def test_score_margin_mse_of_sentence_transformers():
    """Value and gradients must equal MarginMSELoss on raw scores."""
    loss, case = loss_of("score-margin-mse"), random_case()
    expected = st_reranker("MarginMSELoss", case, case.keys.teacher.double(), [["t"] * ROWS] * (GROUP + 1))
    assert_same(loss(case.batch(loss)), expected, [case.scores], **CLOSE)

"""Embedding losses equal those of sentence-transformers, where it has them."""

import pytest
import torch
from torch import Tensor

from lib.training.losses.cosent import CoSENT
from lib.training.losses.gte import GTE
from lib.training.losses.hardness_infonce import HardnessInfoNCE
from lib.training.losses.infonce import InfoNCE
from lib.training.losses.margin_mse import MarginMSE
from lib.training.losses.matryoshka import Matryoshka
from tests.support.loss_cases import CLOSE, DIM, Case, assert_same, random_case


def columns_of(case: Case) -> list[Tensor]:
    """Queries, positives and hard negatives, as sentence-transformers' losses take them."""
    return [case.queries, *case.passages.unbind(1)]


def st_mnrl(case: Case, scale: float, **options):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = torch.nn.Identity()
    return MultipleNegativesRankingLoss(model, scale=scale, **options).compute_loss_from_embeddings(
        columns_of(case), None
    )


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.mark.parametrize(
    ("loss", "scale", "options"),
    [
        (InfoNCE(0.05), 20.0, {}),
        (InfoNCE(0.02), 50.0, {}),
        (GTE(0.01), 100.0, {"directions": DIRECTIONS, "partition_mode": "joint"}),
        (HardnessInfoNCE(0.02, 9.0), 50.0, {"hardness_mode": "all_negatives", "hardness_strength": 9.0}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_multiple_negatives_ranking(loss, scale, options):
    """InfoNCE, GTE and hardness losses must have the value and gradients of MultipleNegativesRankingLoss. Without duplicates, which
    it does not exclude."""
    case = random_case(duplicates=False)
    case.logit_scale = torch.zeros((), dtype=torch.float64)
    leaves = [case.queries, case.passages]
    assert_same(loss(case.batch(loss)), st_mnrl(case, scale, **options), leaves, **CLOSE)


def test_cosent():
    """CoSENT must have the value and gradients of CoSENTLoss, with some equal labels."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    loss, case = CoSENT(0.05), random_case()
    case.logit_scale = torch.zeros((), dtype=torch.float64)
    theirs = CoSENTLoss(torch.nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings([case.queries, case.passages[:, 0]], case.keys.teacher[:, 0])
    assert_same(loss(case.batch(loss)), expected, [case.queries, case.passages], **CLOSE)


def test_margin_mse():
    """Margin-MSE must have the value and gradients of MarginMSELoss on cosines."""
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss
    from sentence_transformers.util import pairwise_cos_sim

    loss, case = MarginMSE(), random_case()
    theirs = MarginMSELoss(torch.nn.Identity(), similarity_fct=pairwise_cos_sim)
    expected = theirs.compute_loss_from_embeddings(columns_of(case), case.keys.teacher.double())
    assert_same(loss(case.batch(loss)), expected, [case.queries, case.passages], **CLOSE)


class IdentityModel(torch.nn.Module):
    """A model that returns its input vectors."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return DIM


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 0.25)])
def test_matryoshka(weights):
    """Matryoshka over InfoNCE must have the value and gradients of MatryoshkaLoss, with equal weights and with others."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    case, model = random_case(duplicates=False), IdentityModel()
    case.logit_scale = torch.zeros((), dtype=torch.float64)
    loss = Matryoshka(InfoNCE(0.05), (6, 4, 2), weights)
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), (6, 4, 2), weights)
    expected = theirs([{"vectors": each} for each in columns_of(case)], None)
    assert_same(loss(case.batch(loss)), expected, [case.queries, case.passages], **CLOSE)

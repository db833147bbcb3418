"""Losses: the values and gradients of a plain reference, of sentence-transformers where it has the loss, at any number of
ranks. A new loss is tested by being there; one of embeddings also wants its plain reference here."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lib.errors import InputError, UsageError
from lib.training import losses
from lib.training.losses import Batch, BatchKeys, Scores, Sum, described, names, parse
from lib.training.losses.classification import Classification
from lib.training.losses.cosent import CoSENT
from lib.training.losses.focal_infonce import FocalInfoNCE
from lib.training.losses.gte import GTE
from lib.training.losses.hardness_infonce import HardnessInfoNCE
from lib.training.losses.infonce import InfoNCE
from lib.training.losses.kl import KL
from lib.training.losses.m3_unified import M3Unified, TokenOutputs, TokenTexts
from lib.training.losses.margin_mse import MarginMSE
from lib.training.losses.matryoshka import Matryoshka
from lib.training.losses.self_normalised import SelfNormalised
from lib.training.losses.tiled_logsumexp import Excluded, log_partition, normalised

ROWS, GROUP, DIM = 8, 3, 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass
class Case:
    """A global batch and the leaves that gradients are asked of."""

    rows: BatchKeys
    queries: Tensor
    passages: Tensor
    scores: Tensor
    sharpness: Tensor
    tokens: TokenOutputs

    @property
    def leaves(self) -> list[Tensor]:
        texts = (self.tokens.queries, self.tokens.passages)
        own = [each for text in texts for each in (text.weights, text.vectors)]
        return [self.queries, self.passages, self.scores, self.sharpness, *own]

    def batch(self, loss, rank: int = 0, world: int = 1, gather=lambda local: local):
        """What the rank gives to the loss."""
        count = ROWS // world
        rows = replace(self.rows, first=rank * count, count=count, world=world)
        if loss.of != losses.EMBEDDING:
            return Scores(rows, self.scores[rows.here])
        queries, passages = self.queries[rows.here], self.passages[rows.here]
        return Batch(rows, queries, passages, gather, self.sharpness, tokens=self.tokens if world == 1 else None)


def case(
    in_batch: bool = True, duplicates: bool = True, dtype=torch.float64, spread: float = 0.3, seed: int = 0
) -> Case:
    """Random rows. Duplicates: two rows of the same query, two of the same positive, and hard negatives that are positives
    of another row, of the own one, and that another row has too."""
    random = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=random, dtype=dtype)
    query_keys = torch.arange(100, 100 + ROWS)
    passage_keys = torch.arange(1000, 1000 + ROWS * GROUP).view(ROWS, GROUP)
    positive_keys = passage_keys[:, :1].repeat(1, 2)
    middle = draw(DIM)
    queries, passages = middle + spread * draw(ROWS, DIM), middle + spread * draw(ROWS, GROUP, DIM)
    if duplicates:
        query_keys[4], queries[4] = query_keys[1], queries[1]
        positive_keys[1, 1], positive_keys[4, 1] = passage_keys[4, 0], passage_keys[1, 0]
        for copy, of in (((5, 0), (3, 0)), ((2, 1), (0, 0)), ((6, 2), (6, 0)), ((7, 1), (3, 2))):
            passage_keys[copy], passages[copy] = passage_keys[of], passages[of]
        positive_keys[5] = passage_keys[5, 0]
    teacher = torch.randint(0, 4, (ROWS, GROUP), generator=random) / 4
    teacher[:, 0] = torch.tensor([0.25, 1.0, 0.5, 0.5, 0.0, 1.0, 0.75, 0.25])
    rows = BatchKeys(query_keys, passage_keys, positive_keys, teacher, in_batch, 0, ROWS, 1)
    tokens = TokenOutputs(texts(random, dtype, ROWS), texts(random, dtype, ROWS * GROUP), (0, 2))
    found = Case(rows, queries, passages, draw(ROWS, GROUP), torch.tensor(-0.5, dtype=dtype), tokens)
    for leaf in found.leaves:
        leaf.requires_grad_()
    return found


def texts(random: torch.Generator, dtype: torch.dtype, count: int) -> TokenTexts:
    """Of 2 to 6 tokens of few words, so that a text has some twice."""
    lengths = torch.randint(2, 7, (count,), generator=random)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(offsets[-1])
    ids = torch.randint(0, 8, (total,), generator=random)
    weights = torch.rand(total, generator=random, dtype=dtype) * 0.2
    return TokenTexts(ids, offsets, weights, torch.randn(total, 5, generator=random, dtype=dtype))


def loss_of(name: str):
    return parse((name,))


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if each is None else each for each, leaf in zip(found, leaves, strict=True)]


def assert_same(got: Tensor, expected: Tensor, leaves: list[Tensor], **tolerance) -> None:
    """Values and the gradients of all leaves."""
    torch.testing.assert_close(got, expected, **tolerance)
    for one, other in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# Plain references: full matrices, no care for overflow or memory.


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def cosines(of: Case) -> Tensor:
    """Of all queries and all passages, [G, G * g]."""
    return unit(of.queries) @ unit(of.passages).flatten(0, 1).T


def own(of: Case, matrix: Tensor) -> Tensor:
    """Columns of the row's own passages, [G, g]."""
    return torch.stack([row.view(ROWS, GROUP)[number] for number, row in enumerate(matrix)])


def counts(of: Case, in_batch: bool | None = None) -> Tensor:
    """Which passage is a negative of which row, bool [G, G * g]."""
    in_batch = of.rows.in_batch if in_batch is None else in_batch
    found = torch.zeros(ROWS, ROWS * GROUP, dtype=torch.bool)
    for row in range(ROWS):
        for column, key in enumerate(of.rows.passage_keys.flatten().tolist()):
            mine = column // GROUP == row
            found[row, column] = (in_batch or mine) and key not in of.rows.positive_keys[row].tolist()
    return found


def plain_entropies(of: Case, temperature: float, margin=None, in_batch=None, weights=None) -> Tensor:
    """-log of the positive's share, [G]; weights: of the negatives, [G, G * g]."""
    scale = of.sharpness.exp() / temperature
    every = cosines(of)
    positive = own(of, every)[:, 0]
    kept = counts(of, in_batch)
    if margin is not None:
        kept = kept & (every <= positive[:, None] + margin)
    exponentials = (scale * every).exp() * (1 if weights is None else weights)
    bad = torch.where(kept, exponentials, 0.0).sum(1)
    good = (scale * positive).exp()
    return -(good / (good + bad)).log()


def plain_infonce(of: Case, loss: InfoNCE) -> Tensor:
    return loss.weight * plain_entropies(of, loss.temperature, loss.margin).mean()


def plain_focal(of: Case, loss: FocalInfoNCE) -> Tensor:
    entropies = plain_entropies(of, loss.temperature)
    return loss.weight * ((1 - (-entropies).exp()) ** loss.gamma * entropies).mean()


def plain_hardness(of: Case, loss: HardnessInfoNCE) -> Tensor:
    weights = (loss.alpha * cosines(of).detach()).exp()
    return loss.weight * plain_entropies(of, loss.temperature, weights=weights).mean()


def plain_self_normalised(of: Case, loss: SelfNormalised) -> Tensor:
    kept = counts(of)
    shares = torch.where(kept, (loss.beta * cosines(of).detach()).exp(), 0.0)
    weights = kept.sum(1, keepdim=True) * shares / shares.sum(1, keepdim=True)
    return loss.weight * plain_entropies(of, loss.temperature, weights=weights).mean()


def plain_classification(of: Case, loss: Classification) -> Tensor:
    return loss.weight * plain_entropies(of, loss.temperature, in_batch=False).mean()


def plain_gte(of: Case, loss: GTE) -> Tensor:
    if not of.rows.in_batch:
        return loss.weight * plain_entropies(of, loss.temperature).mean()
    scale = of.sharpness.exp() / loss.temperature
    queries, passages = unit(of.queries), unit(of.passages)
    keys = of.rows
    total = 0.0
    for row in range(ROWS):
        known = {int(keys.query_keys[row]), *keys.positive_keys[row].tolist()}
        positive = (scale * queries[row] @ passages[row, 0]).exp()
        partition = 2 * positive
        for other in range(ROWS):
            if not known & {int(keys.query_keys[other]), int(keys.passage_keys[other, 0])}:
                partition = partition + (scale * queries[row] @ queries[other]).exp()
                partition = partition + (scale * passages[row, 0] @ queries[other]).exp()
            for place in range(GROUP):
                key = int(keys.passage_keys[other, place])
                if key not in keys.positive_keys[row].tolist():
                    partition = partition + (scale * queries[row] @ passages[other, place]).exp()
                    if int(keys.query_keys[other]) not in known:
                        partition = partition + (scale * passages[row, 0] @ passages[other, place]).exp()
        total = total - (positive / partition).log()
    return loss.weight * total / ROWS


def plain_cosent(of: Case, loss: CoSENT) -> Tensor:
    scores = own(of, cosines(of))[:, 0] * of.sharpness.exp() / loss.temperature
    labels = of.rows.teacher[:, 0]
    above = labels[None, :] > labels[:, None]
    return loss.weight * (1 + torch.where(above, (scores[:, None] - scores[None, :]).exp(), 0.0).sum()).log()


def plain_kl(of: Case, loss: KL) -> Tensor:
    student = (own(of, cosines(of)) * of.sharpness.exp() / loss.temperature).softmax(1)
    teacher = (of.rows.teacher.to(student) / loss.teacher_temperature).softmax(1)
    return loss.weight * (teacher * (teacher / student).log()).sum(1).mean()


def plain_margin_mse(of: Case, loss: MarginMSE) -> Tensor:
    student, teacher = loss.scale * own(of, cosines(of)), of.rows.teacher
    off = [(student[:, 0] - student[:, j]) - (teacher[:, 0] - teacher[:, j]) for j in range(1, GROUP)]
    return loss.weight * torch.stack(off).square().mean()


def plain_words(text: TokenTexts, special: tuple[int, ...]) -> Tensor:
    """The whole vocabulary, [n, 8]."""
    rows = []
    for start, end in zip(text.offsets, text.offsets[1:], strict=False):
        rows.append([torch.zeros((), dtype=text.weights.dtype)] * 8)
        for place in range(start, end):
            if (word := int(text.ids[place])) not in special:
                rows[-1][word] = torch.maximum(rows[-1][word], text.weights[place])
    return torch.stack([torch.stack(row) for row in rows])


def plain_m3(of: Case, loss: M3Unified) -> Tensor:
    tokens, scale = of.tokens, of.sharpness.exp() / loss.temperature
    lexical = plain_words(tokens.queries, tokens.special) @ plain_words(tokens.passages, tokens.special).T
    split = [unit(text.vectors).tensor_split(text.offsets[1:-1]) for text in (tokens.queries, tokens.passages)]
    late = [torch.stack([(q[1:] @ p[1:].T).max(1).values.mean() for p in split[1]]) for q in split[0]]
    kept = counts(of)
    kept[torch.arange(ROWS), torch.arange(ROWS) * GROUP] = True
    scores = {"d": scale * cosines(of), "s": scale * lexical, "c": scale * torch.stack(late)}
    scores["e"] = scores["d"] + 0.3 * scores["s"] + scores["c"]
    total = 0.0
    for row in range(ROWS):
        logs = {name: each[row, kept[row]].log_softmax(0) for name, each in scores.items()}
        place = int(kept[row, : row * GROUP].sum())
        hard = {name: -log[place] for name, log in logs.items()}
        soft = {name: -(logs["e"].detach().exp() * log).sum() for name, log in logs.items()}
        first = (hard["d"] + hard["e"] + 0.1 * hard["s"] + hard["c"]) / 4
        second = (soft["d"] + 0.1 * soft["s"] + soft["c"]) / 3
        total = total + (1 - loss.share) * first + loss.share * second
    return loss.weight * total / ROWS


PLAIN = {
    "infonce": plain_infonce,
    "focal-infonce": plain_focal,
    "hardness-infonce": plain_hardness,
    "self-normalised": plain_self_normalised,
    "classification": plain_classification,
    "gte": plain_gte,
    "cosent": plain_cosent,
    "kl": plain_kl,
    "margin-mse": plain_margin_mse,
    "m3-unified": plain_m3,
}
ASKED = [
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
@pytest.mark.parametrize("asked", ASKED)
def test_embedding_losses_are_their_formulas(asked, in_batch, duplicates):
    """Value and gradients of the plain reference, in float64, with hard negatives, with and without in-batch negatives and
    duplicates, and a learned sharpness."""
    loss, of = loss_of(asked), case(in_batch, duplicates)
    assert_same(loss(of.batch(loss)), PLAIN[asked.partition(":")[0]](of, loss), of.leaves, **EXACT)


def test_every_embedding_loss_has_its_plain_reference():
    """A file in lib/training/losses that is of embeddings is in PLAIN."""
    assert {name for name in names() if loss_of(name).of == losses.EMBEDDING} == set(PLAIN)


@pytest.mark.parametrize("name", names())
def test_every_loss_runs(name):
    """With its defaults on a float32 batch: a finite scalar, finite gradients that are not all zero, a plain record. Twice the
    weight is twice the loss."""
    loss, of = loss_of(name), case(dtype=torch.float32)
    value = loss(of.batch(loss))
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.isfinite()
    found = gradients(value, of.leaves)
    assert all(each.isfinite().all() for each in found)
    assert any(each.any() for each in found)
    assert json.loads(json.dumps(described(loss)))["loss"] == name
    torch.testing.assert_close(replace(loss, weight=2 * loss.weight)(of.batch(loss)), 2 * value)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("world", [2, 4])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(name, world):
    """The mean over ranks of the values is the loss of one rank with all rows, and so are its gradients."""
    if name == "m3-unified":
        pytest.skip("its columns are the passages of one rank, as published")
    loss, of = loss_of(name), case()
    barrier, held = threading.Barrier(world), [None] * world

    def gather(rank: int, local: Tensor) -> Tensor:
        held[rank] = local
        barrier.wait(timeout=60)
        found = torch.cat(held)
        barrier.wait(timeout=60)
        return found

    def value(rank: int) -> Tensor:
        return loss(of.batch(loss, rank, world, partial(gather, rank)))

    with ThreadPoolExecutor(world) as pool:
        values = torch.stack(list(pool.map(value, range(world))))
    assert_same(values.mean(), loss(of.batch(loss)), of.leaves, **EXACT)
    if name == "cosent":
        torch.testing.assert_close(values, values[:1].expand(world), **EXACT)


@pytest.mark.parametrize("name", [name for name in names() if loss_of(name).of == losses.EMBEDDING])
@pytest.mark.parametrize("in_batch", [True, False])
def test_rows_without_negatives_give_no_nan(name, in_batch):
    """Where every passage is a positive of every row, gradients are finite."""
    loss, of = loss_of(name), case(in_batch)
    keys = torch.zeros_like(of.rows.passage_keys)
    of.rows = replace(of.rows, passage_keys=keys, positive_keys=keys[:, :1])
    value = loss(of.batch(loss))
    assert value.isfinite()
    assert all(each.isfinite().all() for each in gradients(value, of.leaves))
    if name in ("infonce", "focal-infonce", "hardness-infonce", "self-normalised", "classification"):
        assert value == 0


def test_temperatures_are_not_rounded_to_the_vectors_precision():
    """bfloat16 vectors: cosines, scale and loss are float32."""
    loss, of = InfoNCE(temperature=0.03), case()
    rough = [each.detach().to(torch.bfloat16) for each in (of.queries, of.passages)]
    got = loss(Batch(of.rows, *rough, lambda local: local))
    wanted = loss(Batch(of.rows, *(each.double() for each in rough), lambda local: local))
    torch.testing.assert_close(got.double(), wanted, **CLOSE)


@pytest.mark.parametrize("name", [name for name in names() if loss_of(name).of == losses.RERANKING])
def test_scores_are_not_taken_at_their_own_precision(name):
    """Of bfloat16 scores, a loss is that of the same numbers in float64, to float32's precision."""
    loss, of = loss_of(name), case()
    of.scores = of.scores.detach().to(torch.bfloat16)
    got, of.scores = loss(of.batch(loss)), of.scores.double()
    torch.testing.assert_close(got.double(), loss(of.batch(loss)), **CLOSE)


# Tiles


@pytest.mark.parametrize("tile", [1, 3, 5, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hardness", [0.0, 9.0])
def test_log_partition_is_logsumexp(tile, masked, hardness):
    """At scale 100, for tiles smaller than the matrix, whole or masked by keys, two a column, and by a ceiling."""
    of = case(duplicates=False)
    rows, columns = (
        unit(of.queries.detach()).requires_grad_(),
        unit(of.passages.detach()).flatten(0, 1).requires_grad_(),
    )
    scale = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    products = rows @ columns.T
    random = torch.Generator().manual_seed(1)
    keys, others = (torch.randint(0, 12, (n, 2), generator=random) for n in products.shape)
    ceiling = products.detach().quantile(0.8, dim=1)
    out = (keys[:, None, :, None] == others[None, :, None, :]).flatten(2).any(2) | (products > ceiling[:, None])
    logits = scale * products + hardness * products.detach()
    expected = (logits.masked_fill(out, float("-inf")) if masked else logits).logsumexp(1)
    excluded = Excluded(keys, others, ceiling) if masked else None
    got = log_partition(rows, columns, scale, excluded, hardness, tile)
    upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    assert_same((got * upstream).sum(), (expected * upstream).sum(), [rows, columns, scale], **EXACT)
    torch.testing.assert_close(got, expected, **EXACT)


def test_log_partition_has_the_gradients_of_differences():
    """gradcheck, masked and in tiles."""
    of = case()
    rows, columns = of.queries.detach().requires_grad_(), of.passages.detach().flatten(0, 1).requires_grad_()
    excluded = Excluded(of.rows.positive_keys, of.rows.passage_keys.flatten())
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    run = partial(log_partition, excluded=excluded, tile=5)
    assert torch.autograd.gradcheck(run, (rows, columns, scale))


def test_log_partition_of_nothing():
    """A row whose columns are all excluded is -inf and gives no gradient, and no NaN; the others are as without it."""
    of = case(duplicates=False)
    rows, columns = of.queries.detach().requires_grad_(), of.passages.detach().flatten(0, 1).requires_grad_()
    scale = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    keys = torch.zeros(ROWS, 1, dtype=torch.int64)
    keys[1:] = 7
    got = log_partition(rows, columns, scale, Excluded(keys, torch.zeros(len(columns), dtype=torch.int64)), tile=5)
    assert got[0].isneginf()
    assert got[1:].isfinite().all()
    value = torch.nn.functional.softplus(got - 1).sum()
    expected = torch.nn.functional.softplus((scale * rows[1:] @ columns.T).logsumexp(1) - 1).sum()
    assert_same(value, expected, [rows, columns, scale], **EXACT)
    assert not torch.autograd.grad(value, rows)[0][0].any()


def test_log_partition_knows_no_autocast():
    """Under autocast the tiles of forward and backward are the same, in float32."""
    of = case(dtype=torch.float32)
    leaves = [of.queries, of.passages]
    run = partial(log_partition, of.queries, of.passages.flatten(0, 1), torch.tensor(50.0))
    with torch.autocast("cpu", torch.bfloat16):
        got = run().sum()
    assert_same(got, run().sum(), leaves, **EXACT)


def test_normalised_is_normalize():
    """Value and gradients of torch's, of a vector of zeros too, for [n, d] and for [n, g, d] that is not contiguous."""
    of = case()
    queries = of.queries.detach().index_fill(0, torch.tensor(2), 0.0).requires_grad_()
    random = torch.Generator().manual_seed(1)
    for leaf in (queries, of.passages):
        vectors = leaf.transpose(0, -2)[..., :4]
        upstream = torch.randn(vectors.shape, generator=random, dtype=torch.float64)
        expected = (torch.nn.functional.normalize(vectors, dim=-1) * upstream).sum()
        assert_same((normalised(vectors) * upstream).sum(), expected, [leaf], **EXACT)
    assert torch.autograd.gradcheck(normalised, of.passages)


# sentence-transformers


def st_columns(of: Case) -> list[Tensor]:
    return [of.queries, *of.passages.unbind(1)]


def st_mnrl(of: Case, scale: float, **options):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = torch.nn.Identity()
    return MultipleNegativesRankingLoss(model, scale=scale, **options).compute_loss_from_embeddings(
        st_columns(of), None
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
def test_multiple_negatives_ranking_of_sentence_transformers(loss, scale, options):
    """Value and gradients of its InfoNCE, GTE and hardness losses, without duplicates, which it does not know of."""
    of = case(duplicates=False)
    of.sharpness = torch.zeros((), dtype=torch.float64)
    leaves = [of.queries, of.passages]
    assert_same(loss(of.batch(loss)), st_mnrl(of, scale, **options), leaves, **CLOSE)


def test_cosent_of_sentence_transformers():
    """Value and gradients, with equal labels among them."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    loss, of = CoSENT(0.05), case()
    of.sharpness = torch.zeros((), dtype=torch.float64)
    theirs = CoSENTLoss(torch.nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings([of.queries, of.passages[:, 0]], of.rows.teacher[:, 0])
    assert_same(loss(of.batch(loss)), expected, [of.queries, of.passages], **CLOSE)


def test_equal_labels_alone_are_no_loss():
    """CoSENT of rows of one label is 0, with gradients of 0."""
    loss, of = CoSENT(), case()
    of.rows = replace(of.rows, teacher=torch.ones(ROWS, GROUP))
    value = loss(of.batch(loss))
    assert value == 0
    assert not any(each.any() for each in gradients(value, of.leaves))


def test_margin_mse_of_sentence_transformers():
    """Value and gradients, on cosines."""
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss
    from sentence_transformers.util import pairwise_cos_sim

    loss, of = MarginMSE(), case()
    theirs = MarginMSELoss(torch.nn.Identity(), similarity_fct=pairwise_cos_sim)
    expected = theirs.compute_loss_from_embeddings(st_columns(of), of.rows.teacher.double())
    assert_same(loss(of.batch(loss)), expected, [of.queries, of.passages], **CLOSE)


class Columns(torch.nn.Module):
    """A model that gives the vectors it is given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return DIM


@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 0.25)])
def test_matryoshka_of_sentence_transformers(weights):
    """Value and gradients over InfoNCE: the weighted sum, of 1 each unless given."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    of, model = case(duplicates=False), Columns()
    of.sharpness = torch.zeros((), dtype=torch.float64)
    loss = Matryoshka(InfoNCE(0.05), (6, 4, 2), weights)
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), (6, 4, 2), weights or None)
    expected = theirs([{"vectors": each} for each in st_columns(of)], None)
    assert_same(loss(of.batch(loss)), expected, [of.queries, of.passages], **CLOSE)


def test_matryoshka_gathers_once():
    """Queries and passages one time each for all lengths; its record holds that of the loss within."""
    calls = []
    loss, of = Matryoshka(parse(("gte", "infonce")), (6, 4, 2)), case()

    def gather(local: Tensor) -> Tensor:
        calls.append(local.shape)
        return local

    loss(of.batch(loss, gather=gather))
    assert len(calls) == 2
    assert set(calls) == {(ROWS, DIM), (ROWS, GROUP, DIM)}
    record = json.loads(json.dumps(described(loss)))
    assert (record["loss"], record["dims"]) == ("matryoshka", [6, 4, 2])
    assert [each["loss"] for each in record["inner"]["sum"]] == ["gte", "infonce"]


def test_matryoshka_refuses_dimensions_that_are_not_there():
    """No dimension, one of 0, one too many, weights of another number."""
    for dims, weights in (((), ()), ((0, 2), ()), ((4, 2), (1.0,))):
        with pytest.raises(UsageError):
            Matryoshka(InfoNCE(), dims, weights)
    loss, of = Matryoshka(InfoNCE(), (8,)), case()
    with pytest.raises(UsageError, match="have 6"):
        loss(of.batch(loss))


def st_reranker(name: str, of: Case, labels, inputs, **options) -> Tensor:
    """The value of sentence-transformers' loss for the pairs' scores, whatever the texts."""
    from sentence_transformers.cross_encoder import CrossEncoder
    from sentence_transformers.cross_encoder import losses as theirs

    pieces = iter([of.scores.flatten()] if len(inputs) == 2 else of.scores.T)

    class Given(CrossEncoder):
        num_labels, device = 1, torch.device("cpu")

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def preprocess(self, pairs, **_):
            return {}

        def forward(self, features, **_):
            return {"scores": next(pieces)}

    return getattr(theirs, name)(Given(), **options)(inputs, labels)


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
def test_graded_reranker_losses_of_sentence_transformers(name, theirs, options, graded):
    """Value and gradients, by the teacher's grades, or by positive and negatives."""
    loss, of = loss_of(name), case()
    labels = of.rows.teacher if graded else ONE_HOT
    of.rows = replace(of.rows, teacher=labels if graded else None)
    if name == "bce":
        expected = st_reranker(theirs, of, labels.flatten().double(), [["q"] * ROWS * GROUP, ["p"] * ROWS * GROUP])
    else:
        expected = st_reranker(theirs, of, list(labels), LISTS, mini_batch_size=-1, **options)
    torch.testing.assert_close(loss(of.batch(loss)), expected.double(), **CLOSE)
    mine, other = (torch.autograd.grad(each, of.scores)[0] for each in (loss(of.batch(loss)), expected))
    torch.testing.assert_close(mine, other, **CLOSE)


def test_ranknet_and_lambdaloss_are_their_formulas():
    """Pair by pair, in float64."""
    of = case()
    labels, scores = of.rows.teacher.tolist(), of.scores
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
                    lost = (1 + (scores[row, j] - scores[row, i]).exp()).log()
                    inverse = [1 / torch.log2(1 + rank.double()) for rank in (ranks[row, i], ranks[row, j])]
                    apart = (ranks[row, i] - ranks[row, j]).abs().double()
                    step = 1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)
                    gain = (2 ** labels[row][i] - 2 ** labels[row][j]) / best
                    sums["ranknet"] += lost
                    weight = gain * (10 * step + (inverse[0] - inverse[1]).abs())
                    sums["lambdaloss"] += weight * lost / torch.log(torch.tensor(2.0).double())
    for name, total in sums.items():
        loss = loss_of(name)
        assert_same(loss(of.batch(loss)), total / pairs, of.leaves, **EXACT)


def test_listwise_losses_of_sentence_transformers():
    """ListNet's cross entropy: to the positive alone, and, less the teacher's entropy, to the teacher."""
    of = case()
    for name, labels in (("listwise", 1000 * ONE_HOT), ("listwise-kl", of.rows.teacher)):
        loss, teacher = loss_of(name), labels.softmax(1)
        entropy = -torch.xlogy(teacher, teacher).sum(1).mean()
        expected = st_reranker("ListNetLoss", of, list(labels), LISTS, mini_batch_size=-1) - entropy
        torch.testing.assert_close(loss(of.batch(loss)), expected.double(), **CLOSE)
        mine, other = (torch.autograd.grad(each, of.scores)[0] for each in (loss(of.batch(loss)), expected))
        torch.testing.assert_close(mine, other, **CLOSE)


def test_score_margin_mse_of_sentence_transformers():
    """Value and gradients on raw scores."""
    loss, of = loss_of("score-margin-mse"), case()
    expected = st_reranker("MarginMSELoss", of, of.rows.teacher.double(), [["t"] * ROWS] * (GROUP + 1))
    assert_same(loss(of.batch(loss)), expected, [of.scores], **CLOSE)


# Names and refusals


def test_names_and_parameters():
    """Of the command line; several losses are added up; what does not exist is refused with the choices."""
    assert parse(("infonce:temperature=0.05,margin=0.1,weight=0.5",)) == InfoNCE(0.05, 0.1, 0.5)
    assert parse(("focal_infonce",)) == FocalInfoNCE()
    both, of = parse(("infonce", "cosent:weight=0.04")), case()
    assert both == Sum((InfoNCE(), CoSENT(weight=0.04)))
    torch.testing.assert_close(both(of.batch(both)), sum(each(of.batch(each)) for each in both.losses), **EXACT)
    for asked, word in (("nce", "infonce"), ("gte:tau=1", "temperature"), ("gte:temperature=x", "float")):
        with pytest.raises(UsageError, match=word):
            parse((asked,))
    with pytest.raises(UsageError, match="one kind"):
        parse(("infonce", "listwise"))
    with pytest.raises(UsageError, match="matryoshka"):
        parse(("matryoshka",))


@pytest.mark.parametrize("name", ["cosent", "kl", "margin-mse", "listwise-kl", "score-margin-mse"])
def test_losses_of_scores_refuse_data_without(name):
    """And say what the dataset lacks."""
    loss, of = loss_of(name), case()
    of.rows = replace(of.rows, teacher=None)
    with pytest.raises(InputError, match="pos_scores"):
        loss(of.batch(loss))


def test_other_data_that_losses_refuse():
    """Margins without negatives, raw scores as degrees, vectors of tokens from a model without."""
    of = case()
    alone = replace(of.rows, passage_keys=of.rows.passage_keys[:, :1], teacher=of.rows.teacher[:, :1])
    with pytest.raises(InputError, match="negatives"):
        MarginMSE()(Batch(alone, of.queries, of.passages[:, :1], lambda local: local))
    with pytest.raises(InputError, match="from 0 to 1"):
        loss_of("bce")(Scores(replace(of.rows, teacher=8 * of.rows.teacher), of.scores))
    with pytest.raises(InputError, match="BGE-M3"):
        M3Unified()(Batch(of.rows, of.queries, of.passages, lambda local: local))


def test_losses_are_named_without_torch():
    """`lib.training.losses` and all losses are imported, parsed and described without torch."""
    program = "import sys; from lib.training.losses import names, parse, described; "
    program += "[described(parse((name,))) for name in names()]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

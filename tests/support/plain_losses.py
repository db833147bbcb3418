"""Plain reference implementations of the embedding losses: full matrices, without care for overflow or memory."""

import torch
from torch import Tensor

from lib.training.losses import TokenTexts
from lib.training.losses.classification import Classification
from lib.training.losses.cosent import CoSENT
from lib.training.losses.focal_infonce import FocalInfoNCE
from lib.training.losses.gte import GTE
from lib.training.losses.hardness_infonce import HardnessInfoNCE
from lib.training.losses.infonce import InfoNCE
from lib.training.losses.kl import KL
from lib.training.losses.m3_unified import M3Unified
from lib.training.losses.margin_mse import MarginMSE
from lib.training.losses.self_normalised import SelfNormalised
from tests.support.loss_cases import GROUP, ROWS, WORDS, Case, unit


def cosines(case: Case) -> Tensor:
    """Cosines of all queries and all passages, [G, G * g]."""
    return unit(case.queries) @ unit(case.passages).flatten(0, 1).T


def own(case: Case, matrix: Tensor) -> Tensor:
    """The columns of each row's own passages, [G, g]."""
    return torch.stack([row.view(ROWS, GROUP)[number] for number, row in enumerate(matrix)])


def negative_mask(case: Case, in_batch: bool | None = None) -> Tensor:
    """The passages that are negatives of each row, bool [G, G * g]."""
    in_batch = case.keys.in_batch if in_batch is None else in_batch
    mask = torch.zeros(ROWS, ROWS * GROUP, dtype=torch.bool)
    for row in range(ROWS):
        for column, key in enumerate(case.keys.passage_keys.flatten().tolist()):
            mask[row, column] = (in_batch or column // GROUP == row) and key not in case.keys.positive_keys[
                row
            ].tolist()
    return mask


def plain_cross_entropies(case: Case, temperature: float, margin=None, in_batch=None, weights=None) -> Tensor:
    """-log softmax probability of each row's positive, [G]. weights: of the negatives, [G, G * g]."""
    scale = case.logit_scale.exp() / temperature
    all_cosines = cosines(case)
    positive = own(case, all_cosines)[:, 0]
    negatives = negative_mask(case, in_batch)
    if margin is not None:
        negatives = negatives & (all_cosines <= positive[:, None] + margin)
    exponentials = (scale * all_cosines).exp() * (1 if weights is None else weights)
    negative_sum = torch.where(negatives, exponentials, 0.0).sum(1)
    numerator = (scale * positive).exp()
    return -(numerator / (numerator + negative_sum)).log()


def plain_infonce(case: Case, loss: InfoNCE) -> Tensor:
    return loss.weight * plain_cross_entropies(case, loss.temperature, loss.margin).mean()


def plain_focal(case: Case, loss: FocalInfoNCE) -> Tensor:
    entropies = plain_cross_entropies(case, loss.temperature)
    return loss.weight * ((1 - (-entropies).exp()) ** loss.gamma * entropies).mean()


def plain_hardness(case: Case, loss: HardnessInfoNCE) -> Tensor:
    weights = (loss.alpha * cosines(case).detach()).exp()
    return loss.weight * plain_cross_entropies(case, loss.temperature, weights=weights).mean()


def plain_self_normalised(case: Case, loss: SelfNormalised) -> Tensor:
    negatives = negative_mask(case)
    shares = torch.where(negatives, (loss.beta * cosines(case).detach()).exp(), 0.0)
    weights = negatives.sum(1, keepdim=True) * shares / shares.sum(1, keepdim=True)
    return loss.weight * plain_cross_entropies(case, loss.temperature, weights=weights).mean()


def plain_classification(case: Case, loss: Classification) -> Tensor:
    return loss.weight * plain_cross_entropies(case, loss.temperature, in_batch=False).mean()


def plain_gte(case: Case, loss: GTE) -> Tensor:
    if not case.keys.in_batch:
        return loss.weight * plain_cross_entropies(case, loss.temperature).mean()
    scale = case.logit_scale.exp() / loss.temperature
    queries, passages = unit(case.queries), unit(case.passages)
    keys = case.keys
    total = 0.0
    for row in range(ROWS):
        known = {int(keys.query_keys[row]), *keys.positive_keys[row].tolist()}
        positive = (scale * queries[row] @ passages[row, 0]).exp()
        partition = 2 * positive
        for other in range(ROWS):
            if not known & {int(keys.query_keys[other]), int(keys.passage_keys[other, 0])}:
                partition = partition + (scale * queries[row] @ queries[other]).exp()
                partition = partition + (scale * passages[row, 0] @ queries[other]).exp()
            for column in range(GROUP):
                key = int(keys.passage_keys[other, column])
                if key not in keys.positive_keys[row].tolist():
                    partition = partition + (scale * queries[row] @ passages[other, column]).exp()
                    if int(keys.query_keys[other]) not in known:
                        partition = partition + (scale * passages[row, 0] @ passages[other, column]).exp()
        total = total - (positive / partition).log()
    return loss.weight * total / ROWS


def plain_cosent(case: Case, loss: CoSENT) -> Tensor:
    scores = own(case, cosines(case))[:, 0] * case.logit_scale.exp() / loss.temperature
    labels = case.keys.teacher[:, 0]
    higher = labels[None, :] > labels[:, None]
    return loss.weight * (1 + torch.where(higher, (scores[:, None] - scores[None, :]).exp(), 0.0).sum()).log()


def plain_kl(case: Case, loss: KL) -> Tensor:
    student = (own(case, cosines(case)) * case.logit_scale.exp() / loss.temperature).softmax(1)
    teacher = (case.keys.teacher.to(student) / loss.teacher_temperature).softmax(1)
    return loss.weight * (teacher * (teacher / student).log()).sum(1).mean()


def plain_margin_mse(case: Case, loss: MarginMSE) -> Tensor:
    student, teacher = loss.scale * own(case, cosines(case)), case.keys.teacher
    errors = [(student[:, 0] - student[:, j]) - (teacher[:, 0] - teacher[:, j]) for j in range(1, GROUP)]
    return loss.weight * torch.stack(errors).square().mean()


def plain_words(text: TokenTexts, special: tuple[int, ...]) -> Tensor:
    """The weight of each word of the vocabulary in each text, [n, words]."""
    rows = []
    for start, end in zip(text.offsets, text.offsets[1:], strict=False):
        rows.append([torch.zeros((), dtype=text.weights.dtype)] * WORDS)
        for position in range(start, end):
            if (word := int(text.ids[position])) not in special:
                rows[-1][word] = torch.maximum(rows[-1][word], text.weights[position])
    return torch.stack([torch.stack(row) for row in rows])


def plain_m3(case: Case, loss: M3Unified) -> Tensor:
    tokens, scale = case.tokens, case.logit_scale.exp() / loss.temperature
    lexical = plain_words(tokens.queries, tokens.special) @ plain_words(tokens.passages, tokens.special).T
    split = [unit(text.vectors).tensor_split(text.offsets[1:-1]) for text in (tokens.queries, tokens.passages)]
    late = [torch.stack([(q[1:] @ p[1:].T).max(1).values.mean() for p in split[1]]) for q in split[0]]
    candidates = negative_mask(case)
    candidates[torch.arange(ROWS), torch.arange(ROWS) * GROUP] = True
    scores = {"d": scale * cosines(case), "s": scale * lexical, "c": scale * torch.stack(late)}
    scores["e"] = scores["d"] + 0.3 * scores["s"] + scores["c"]
    total = 0.0
    for row in range(ROWS):
        logs = {name: each[row, candidates[row]].log_softmax(0) for name, each in scores.items()}
        position = int(candidates[row, : row * GROUP].sum())
        hard = {name: -log[position] for name, log in logs.items()}
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

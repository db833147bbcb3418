"""RetroMAE on tiny models: its decoder, its loss, and that it learns."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from lib.errors import ModelError
from lib.models.forward import PackedBatch, flatten, run_equal_length
from lib.models.load import position_start
from lib.models.spec import ModelSpec, Tokens
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from lib.recipes import Recipe
from lib.training.models import retromae_model, word_masking
from lib.training.models.networks import load_backbone
from lib.training.models.retromae_model import RetroMAE
from lib.training.models.word_masking import Masks, draw_masks
from tests.support import tiny

CPU = torch.device("cpu")
KINDS = ["bert", "xlm-roberta"]
TEXTS = [tiny.TEXT[i % len(tiny.TEXT)] for i in range(8)] + ["fish", "a group of fish"]


def retromae(spec: ModelSpec, seed: int = 0) -> RetroMAE:
    return RetroMAE(spec, load_backbone(spec, CPU)[0], seed).eval()


def loaded(build: Any, kind: str) -> tuple[RetroMAE, Tokens]:
    spec = read_spec(str(build(kind)))
    return retromae(spec), Tokenizer(spec)(TEXTS)


def seeds_of(texts: int, step: int = 0) -> np.ndarray:
    """Seeds of each text: of the run, the step and the row."""
    return np.array([[7, step, row] for row in range(texts)])


def masked_batch(model: RetroMAE, tokens: Tokens, rows: list[int], step: int = 0) -> tuple[PackedBatch, Masks]:
    """Some of the texts as a batch, with the masks that they have among all texts."""
    parts = [tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows]
    borders = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    ids = np.concatenate(parts)
    seeds = seeds_of(len(tokens.offsets) - 1, step)[rows]
    return flatten(ids, borders, position_start(model.backbone.network), CPU), draw_masks(
        ids, borders, model.vocabulary, seeds
    )


def loss_of(model: RetroMAE, tokens: Tokens, rows: list[int], step: int = 0) -> torch.Tensor:
    return model.losses(*masked_batch(model, tokens, rows, step)).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_every_weight_learns(kind: str, build: Any) -> None:
    """In 30 steps of AdamW with new masks each, the loss must fall by at least a quarter and every weight must have a gradient."""
    model, tokens = loaded(build, kind)
    rows = list(range(len(TEXTS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = loss_of(model, tokens, rows, step=99).item()
    model.train()
    for step in range(30):
        optimizer.zero_grad()
        (loss_of(model, tokens, rows, step) / len(rows)).backward()
        untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not untouched
        optimizer.step()
    model.eval()

    assert loss_of(model, tokens, rows, step=99).item() < before * 3 / 4


@pytest.mark.parametrize("kind", [*KINDS, "mpnet"])
def test_a_text_has_the_same_loss_alone_and_among_others(kind: str, build: Any) -> None:
    """The loss of a batch must be the sum of its texts' losses for any split, packed or in batches of one length."""
    model, tokens = loaded(build, kind)
    with torch.no_grad():
        alone = [loss_of(model, tokens, [row]).item() for row in range(len(TEXTS))]
        together = loss_of(model, tokens, list(range(len(TEXTS)))).item()
        others = loss_of(model, tokens, [3, 9, 0]).item()

    assert together == pytest.approx(sum(alone), rel=1e-5)
    assert others == pytest.approx(alone[3] + alone[9] + alone[0], rel=1e-5)


def test_gradients_add_up_over_chunks(build: Any) -> None:
    """The gradients of two chunks must add up to those of one."""
    model, tokens = loaded(build, "bert")
    loss_of(model, tokens, list(range(10))).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9]):
        loss_of(model, tokens, rows).backward()

    for one, parameter in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-4)


def test_logits_and_attention_in_parts_change_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing logits and attention in parts, which bounds memory, must not change the loss or the gradients."""
    model, tokens = loaded(build, "bert")
    rows = [0, 0, 0, 1, 2]
    whole = loss_of(model, tokens, rows)
    whole.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(retromae_model, "LOGITS", 1000)
    monkeypatch.setattr(retromae_model, "SCORES", 2 * int(tokens.offsets[1]) ** 2)
    parts = loss_of(model, tokens, rows)
    parts.backward()

    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-4)


def test_the_loss_is_what_the_paper_says(build: Any) -> None:
    """The loss of one text must equal the paper's, computed position by position with transformers' own forward pass."""
    model, tokens = loaded(build, "bert")
    batch, masks = masked_batch(model, tokens, [2])
    length = len(batch.ids)
    with torch.no_grad():
        stock = AutoModel.from_pretrained(model.backbone.network.name_or_path, add_pooling_layer=False)
        states = stock(input_ids=torch.from_numpy(masks.encoder_ids)[None]).last_hidden_state[0]
        embedded = stock.embeddings(input_ids=batch.ids[None])[0]
        seen = torch.cat([states[:1], embedded[1:]])
        queries = states[:1] + stock.embeddings.position_embeddings.weight[:length]
        hidden = torch.from_numpy(masks.hidden).view(min(length, word_masking.SETS), length)
        rows = []
        for place in range(length):
            allowed = ~hidden[masks.set_of_position[place]]
            allowed[place], allowed[0] = False, True
            rows.append(model.decoder(queries[None, place : place + 1], seen[None], allowed[None, None])[0, 0])
        targets = torch.from_numpy(masks.decoder_targets)
        cross_entropy = torch.nn.functional.cross_entropy
        encoder = cross_entropy(model.head(states[masks.encoder_targets]), batch.ids[masks.encoder_targets])
        decoder = cross_entropy(model.head(torch.stack(rows)[targets]), batch.ids[targets])

        assert model.losses(batch, masks).item() == pytest.approx((encoder + decoder).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_never_sees_its_own_token(kind: str, build: Any) -> None:
    """With fixed encoder states, a changed token must change the output of exactly the positions that attend to it, never its own."""
    model, tokens = loaded(build, kind)
    batch, masks = masked_batch(model, tokens, [0, 3])
    first_states = torch.randn(2, model.backbone.network.config.hidden_size)
    with torch.no_grad():
        before = model.decode(first_states, batch, masks)
        for place in (1, 5, int(batch.borders[1]) + 2):
            ids = batch.ids.clone()
            ids[place] = 50 if ids[place] != 50 else 51
            after = model.decode(first_states, PackedBatch(ids, batch.positions, batch.offsets, batch.borders), masks)
            changed = (after - before).abs().amax(1) > 1e-7

            assert not changed[place]
            np.testing.assert_array_equal(changed.numpy(), _attending(place, batch.borders, masks))
        assert not torch.equal(model.decode(first_states + 1, batch, masks)[5], before[5])


def _attending(place: int, borders: np.ndarray, masks: Masks) -> np.ndarray:
    """Positions that attend to the token at `place`, computed from the sets: bool [tokens]."""
    attends, start = np.zeros(borders[-1], dtype=bool), 0
    for first, end in pairwise(borders):
        length = end - first
        sets = masks.hidden[start : (start := start + min(length, word_masking.SETS) * length)].reshape(-1, length)
        if first <= place < end:
            attends[first:end] = ~sets[masks.set_of_position[first:end], place - first]
    attends[place] = False
    return attends


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_saved_and_reloads(kind: str, build: Any, tmp_path: Path) -> None:
    """save_pretrained of the encoder must write a plain checkpoint with the same hidden states."""
    model, tokens = loaded(build, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of(model, tokens, [0, 1]).backward()
    optimizer.step()
    model.backbone.network.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    batch, _ = masked_batch(model, tokens, [2])
    with torch.no_grad():
        expected = model.backbone(batch)

        torch.testing.assert_close(run_equal_length(again, batch), expected, rtol=1e-5, atol=1e-5)


def test_the_head_of_the_checkpoint_is_used(build: Any, tmp_path: Path) -> None:
    """The head of a masked language model must be loaded; a missing one must be random, and the same for the same seed."""
    folder = build("bert")
    config = transformers.AutoConfig.from_pretrained(folder)
    whole = transformers.AutoModelForMaskedLM.from_config(config)
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    kept = retromae(read_spec(str(tmp_path), Recipe(max_tokens=64)))
    fresh, same, other = (retromae(read_spec(str(folder)), seed) for seed in (0, 0, 1))

    torch.testing.assert_close(kept.head.state_dict(), whole.cls.state_dict())
    assert kept.head.predictions.decoder.weight is kept.backbone.network.get_input_embeddings().weight
    assert torch.equal(fresh.head.predictions.transform.LayerNorm.weight, torch.ones(tiny.HIDDEN))
    torch.testing.assert_close(fresh.state_dict(), same.state_dict())
    for path in ("decoder.query.weight", "head.predictions.transform.dense.weight"):
        assert not torch.equal(fresh.get_parameter(path), other.get_parameter(path))


def test_unsupported_models_are_refused(build: Any) -> None:
    """A decoder (no masked-language head) and ModernBERT (no position table) must be refused."""
    for kind in ("qwen3", "modernbert"):
        with pytest.raises(ModelError, match="RetroMAE"):
            retromae(read_spec(str(build(kind))))


def test_a_text_without_words_adds_nothing(build: Any) -> None:
    """The loss of [CLS] [SEP] alone must be 0, not NaN."""
    model, _ = loaded(build, "bert")
    tokens = Tokenizer(read_spec(str(build("bert"))))([""])
    batch = flatten(tokens.ids, tokens.offsets, None, CPU)

    assert model.losses(batch, draw_masks(tokens.ids, tokens.offsets, model.vocabulary, seeds_of(1))).item() == 0.0

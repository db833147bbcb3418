"""RetroMAE: its masks, its decoder, and that it learns, on tiny models."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from lib.errors import ModelError, UsageError
from lib.models.forward import PackedBatch, flatten, run_equal_length
from lib.models.spec import ModelSpec, Tokens
from lib.models.spec_reader import SpecOverrides, read_spec
from lib.models.tokenizer import Tokenizer
from lib.training.models import retromae_model, word_masking
from lib.training.models.retromae_model import RetroMAE
from lib.training.models.word_masking import Drawn, Words, draw, mask, read_words
from tests.support import tiny

CPU = torch.device("cpu")
KINDS = ["bert", "xlm-roberta"]
TEXTS = [tiny.TEXT[i % len(tiny.TEXT)] for i in range(8)] + ["fish", "a group of fish"]


def loaded(build: Any, kind: str) -> tuple[RetroMAE, Tokens]:
    spec = read_spec(str(build(kind)))
    return RetroMAE(spec, device=CPU), Tokenizer(spec)(TEXTS)


def seeds_of(texts: int, step: int = 0) -> np.ndarray:
    return np.array([[7, step, row] for row in range(texts)])


def drawn(model: RetroMAE, tokens: Tokens, rows: list[int], step: int = 0) -> tuple[PackedBatch, Drawn]:
    """The rows of the tokens as a batch, with the masks that they have in the whole."""
    parts = [tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows]
    borders = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    ids = np.concatenate(parts)
    seeds = seeds_of(len(tokens.offsets) - 1, step)[rows]
    return flatten(ids, borders, model.padding_id, CPU), draw(ids, borders, model.words, seeds)


def loss_of(model: RetroMAE, tokens: Tokens, rows: list[int], step: int = 0) -> torch.Tensor:
    return model(*drawn(model, tokens, rows, step))


def vocabulary(spec: ModelSpec) -> list[str]:
    return AutoTokenizer.from_pretrained(spec.folder).convert_ids_to_tokens(range(5, 90))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_every_weight_learns(kind: str, build: Any) -> None:
    """In 30 steps of AdamW on repeated texts, with fresh masks at each, the loss falls by a quarter and more."""
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
    """The loss of a batch is the sum of its texts' losses, however they are cut; packed or in batches of one length."""
    model, tokens = loaded(build, kind)
    with torch.no_grad():
        alone = [loss_of(model, tokens, [row]).item() for row in range(len(TEXTS))]
        together = loss_of(model, tokens, list(range(len(TEXTS)))).item()
        others = loss_of(model, tokens, [3, 9, 0]).item()

    assert together == pytest.approx(sum(alone), rel=1e-5)
    assert others == pytest.approx(alone[3] + alone[9] + alone[0], rel=1e-5)


def test_gradients_add_up_over_chunks(build: Any) -> None:
    """Two chunks give the gradients of one."""
    model, tokens = loaded(build, "bert")
    loss_of(model, tokens, list(range(10))).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9]):
        loss_of(model, tokens, rows).backward()

    for one, parameter in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-4, atol=1e-4)


def test_logits_and_attention_in_parts_change_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that bound the memory give the loss and gradients of the whole."""
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
    """Written out for one text with transformers' own forward: encoder on masked tokens, decoder on all of them."""
    model, tokens = loaded(build, "bert")
    batch, masks = drawn(model, tokens, [2])
    length = len(batch.ids)
    with torch.no_grad():
        stock = AutoModel.from_pretrained(model.network.name_or_path, add_pooling_layer=False)
        states = stock(input_ids=torch.from_numpy(masks.ids)[None]).last_hidden_state[0]
        embedded = stock.embeddings(input_ids=batch.ids[None])[0]
        seen = torch.cat([states[:1], embedded[1:]])
        queries = states[:1] + stock.embeddings.position_embeddings.weight[:length]
        hidden = torch.from_numpy(masks.hidden).view(min(length, word_masking.SETS), length)
        rows = []
        for place in range(length):
            allowed = ~hidden[masks.choice[place]]
            allowed[place], allowed[0] = False, True
            rows.append(model.decoder(queries[None, place : place + 1], seen[None], allowed[None, None])[0, 0])
        told = torch.from_numpy(masks.told)
        cross_entropy = torch.nn.functional.cross_entropy
        encoder = cross_entropy(model.head(states[masks.places]), batch.ids[masks.places])
        decoder = cross_entropy(model.head(torch.stack(rows)[told]), batch.ids[told])

        assert model(batch, masks).item() == pytest.approx((encoder + decoder).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_never_sees_its_own_token(kind: str, build: Any) -> None:
    """With the encoder's states fixed, another token at a place changes what others make of it, and not its own."""
    model, tokens = loaded(build, kind)
    batch, masks = drawn(model, tokens, [0, 3])
    heads = torch.randn(2, model.network.config.hidden_size)
    with torch.no_grad():
        before = model.decode(heads, batch, masks)
        for place in (1, 5, int(batch.borders[1]) + 2):
            ids = batch.ids.clone()
            ids[place] = 50 if ids[place] != 50 else 51
            after = model.decode(heads, PackedBatch(ids, batch.positions, batch.offsets, batch.borders), masks)
            changed = (after - before).abs().amax(1) > 1e-7

            assert not changed[place]
            np.testing.assert_array_equal(changed.numpy(), _who_sees(place, batch.borders, masks))
        assert not torch.equal(model.decode(heads + 1, batch, masks)[5], before[5])


def _who_sees(place: int, borders: np.ndarray, masks: Drawn) -> np.ndarray:
    """Positions that see the token at `place`, read from the sets: bool [tokens]."""
    sees, start = np.zeros(borders[-1], dtype=bool), 0
    for first, end in pairwise(borders):
        length = end - first
        sets = masks.hidden[start : (start := start + min(length, word_masking.SETS) * length)].reshape(-1, length)
        if first <= place < end:
            sees[first:end] = ~sets[masks.choice[first:end], place - first]
    sees[place] = False
    return sees


def test_masks_hit_the_share_and_spare_special_tokens() -> None:
    """30 % of the words' tokens over many texts, never a special one; 80 % [MASK], 10 % another token, 10 % as it was."""
    random = np.random.default_rng(1)
    words = Words(random.random(1000) < 0.3, np.arange(1000) < 5, 4)
    lengths = random.integers(3, 60, size=2000)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(5, 1000, size=borders[-1])
    ids[borders[:-1]], ids[borders[1:] - 1], ids[borders[:-1] + 1] = 2, 3, 1  # [UNK] is no word either
    shown, places = mask(ids, borders, words, 0.3, seeds_of(2000))
    fate = np.array([(shown[places] == 4).mean(), (shown[places] == ids[places]).mean()])

    assert len(places) / (len(ids) - 6000) == pytest.approx(0.3, abs=0.01)
    assert not words.special[ids[places]].any()
    assert len(np.unique(places)) == len(places)
    untouched = np.ones(len(ids), dtype=bool)
    untouched[places] = False
    np.testing.assert_array_equal(shown[untouched], ids[untouched])
    np.testing.assert_allclose(fate, [0.8, 0.1], atol=0.02)
    assert not (words.special[shown] & ~words.special[ids] & (shown != 4)).any()


def test_a_text_is_masked_the_same_in_any_chunk() -> None:
    """Masks depend on a text's tokens and seeds alone; another seed gives others."""
    random = np.random.default_rng(2)
    words = Words(random.random(100) < 0.3, np.arange(100) < 5, 4)
    borders = np.array([0, 40, 70, 300])
    ids = random.integers(5, 100, size=300)
    whole = draw(ids, borders, words, seeds_of(3))
    part = draw(ids[40:], borders[1:] - 40, words, seeds_of(3)[1:])

    np.testing.assert_array_equal(part.ids, whole.ids[40:])
    np.testing.assert_array_equal(part.places, whole.places[whole.places >= 40] - 40)
    np.testing.assert_array_equal(part.choice, whole.choice[40:])
    np.testing.assert_array_equal(part.hidden, whole.hidden[40 * 40 :])
    assert not np.array_equal(draw(ids, borders, words, seeds_of(3, step=1)).places, whole.places)


def test_whole_words_are_masked_and_hidden_whole() -> None:
    """Pieces that go on with a word share its fate, in the encoder and in each set of the decoder; half is hidden."""
    random = np.random.default_rng(3)
    words = Words(np.arange(100) >= 50, np.arange(100) < 5, 4)
    ids = random.integers(5, 100, size=400)
    ids[[0, -1]] = 2, 3
    words_of = np.cumsum((ids < 50) | (np.arange(400) == 1))
    masks = draw(ids, np.array([0, 400]), words, seeds_of(1))
    chosen = np.zeros(400, dtype=bool)
    chosen[masks.places] = True
    hidden = masks.hidden.reshape(word_masking.SETS, 400)

    for word in np.unique(words_of[1:-1]):
        inside = np.flatnonzero(words_of[1:-1] == word) + 1
        assert len(set(chosen[inside])) == 1
        assert (hidden[:, inside] == hidden[:, inside[:1]]).all()
    assert not hidden[:, [0, -1]].any()
    assert hidden[:, 1:-1].mean() == pytest.approx(0.5, abs=0.02)


def test_words_are_told_by_the_vocabulary(build: Any) -> None:
    """## goes on in WordPiece, ▁ begins in SentencePiece; a Chinese character and a mark are words; GPT's pieces are too."""
    spec = read_spec(str(build("bert")))
    pieces, words = vocabulary(spec), read_words(spec, 400)
    assert [piece.startswith("##") for piece in pieces] == words.continues[5:90].tolist()
    assert any(words.continues)
    assert words.special[[0, 1, 2, 3, 4, 399]].all()
    assert not words.special[5:90].any()

    spec = read_spec(str(build("xlm-roberta")))
    words = read_words(spec, 300)
    told = dict(zip(vocabulary(spec), words.continues[5:90].tolist(), strict=True))
    assert not any(told[piece] for piece in told if piece[0] in "▁查询和文。,，")
    assert all(told[piece] for piece in told if piece.isascii() and piece.isalnum())
    assert not read_words(read_spec(str(build("roberta"))), 400).continues.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_is_saved_and_reloads(kind: str, build: Any, tmp_path: Path) -> None:
    """What save_pretrained of `network` writes is a plain checkpoint that gives the same states."""
    model, tokens = loaded(build, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of(model, tokens, [0, 1]).backward()
    optimizer.step()
    model.network.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    batch, _ = drawn(model, tokens, [2])
    with torch.no_grad():
        mine = retromae_model.run_packed(model.network, batch)

        torch.testing.assert_close(run_equal_length(again, batch), mine, rtol=1e-5, atol=1e-5)


def test_the_head_of_the_checkpoint_is_used(build: Any, tmp_path: Path) -> None:
    """A masked language model keeps its head; where there is none it is fresh, and the same for the same seed."""
    folder = build("bert")
    config = transformers.AutoConfig.from_pretrained(folder)
    whole = transformers.AutoModelForMaskedLM.from_config(config)
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    kept = RetroMAE(read_spec(str(tmp_path), SpecOverrides(max_tokens=64)), device=CPU)
    fresh, same, other = (RetroMAE(read_spec(str(folder)), device=CPU, seed=seed) for seed in (0, 0, 1))

    assert kept.fresh_head == ()
    torch.testing.assert_close(kept.head.state_dict(), whole.cls.state_dict())
    assert kept.head.predictions.decoder.weight is kept.network.get_input_embeddings().weight
    assert "cls.predictions.transform.dense.weight" in fresh.fresh_head
    assert torch.equal(fresh.head.predictions.transform.LayerNorm.weight, torch.ones(tiny.HIDDEN))
    torch.testing.assert_close(fresh.state_dict(), same.state_dict())
    assert not torch.equal(fresh.decoder.query.weight, other.decoder.query.weight)


def test_what_cannot_be_pretrained_is_refused(build: Any) -> None:
    """A decoder has no masked-language head, ModernBERT no table of positions, an empty text no first state."""
    for kind in ("qwen3", "modernbert"):
        with pytest.raises(ModelError, match="RetroMAE"):
            RetroMAE(read_spec(str(build(kind))), device=CPU)
    words = Words(np.zeros(9, dtype=bool), np.arange(9) < 5, 4)
    with pytest.raises(UsageError, match="special tokens"):
        draw(np.array([2, 3]), np.array([0, 2, 2]), words, seeds_of(2))
    with pytest.raises(UsageError, match="1 seeds"):
        draw(np.array([2, 3]), np.array([0, 1, 2]), words, seeds_of(1))


def test_a_text_without_words_adds_nothing(build: Any) -> None:
    """[CLS] [SEP] alone has nothing to tell, and its loss is 0 rather than NaN."""
    model, _ = loaded(build, "bert")
    tokens = Tokenizer(read_spec(str(build("bert"))))([""])
    batch = flatten(tokens.ids, tokens.offsets, model.padding_id, CPU)

    assert model(batch, draw(tokens.ids, tokens.offsets, model.words, seeds_of(1))).item() == 0.0

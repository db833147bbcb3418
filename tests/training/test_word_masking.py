"""Whole-word masks of RetroMAE."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lib.models.spec import ModelSpec
from lib.models.spec_reader import read_spec
from lib.training.models import word_masking
from lib.training.models.word_masking import WordVocabulary, draw_masks, read_word_vocabulary


def seeds_of(texts: int, step: int = 0) -> np.ndarray:
    """Seeds of each text: of the run, the step and the row."""
    return np.array([[7, step, row] for row in range(texts)])


def vocabulary(spec: ModelSpec) -> list[str]:
    return AutoTokenizer.from_pretrained(spec.folder).convert_ids_to_tokens(range(5, 90))


def test_masks_hit_the_share_and_spare_special_tokens() -> None:
    """30 % of the words' tokens must be chosen, never a special one; of these 80 % [MASK], 10 % another token, 10 % unchanged."""
    random = np.random.default_rng(1)
    words = WordVocabulary(random.random(1000) < 0.3, np.arange(1000) < 5, 4)
    lengths = random.integers(3, 60, size=2000)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(5, 1000, size=borders[-1])
    ids[borders[:-1]], ids[borders[1:] - 1], ids[borders[:-1] + 1] = 2, 3, 1  # [UNK] is no word either
    masks = draw_masks(ids, borders, words, seeds_of(2000))
    shown, positions = masks.encoder_ids, masks.encoder_targets
    fate = np.array([(shown[positions] == 4).mean(), (shown[positions] == ids[positions]).mean()])

    assert len(positions) / (len(ids) - 6000) == pytest.approx(0.3, abs=0.01)
    assert not words.special[ids[positions]].any()
    assert len(np.unique(positions)) == len(positions)
    untouched = np.ones(len(ids), dtype=bool)
    untouched[positions] = False
    np.testing.assert_array_equal(shown[untouched], ids[untouched])
    np.testing.assert_allclose(fate, [0.8, 0.1], atol=0.02)
    assert not (words.special[shown] & ~words.special[ids] & (shown != 4)).any()


def test_a_text_is_masked_the_same_in_any_chunk() -> None:
    """Masks must depend on a text's tokens and seeds alone; another seed must give other masks."""
    random = np.random.default_rng(2)
    words = WordVocabulary(random.random(100) < 0.3, np.arange(100) < 5, 4)
    borders = np.array([0, 40, 70, 300])
    ids = random.integers(5, 100, size=300)
    whole = draw_masks(ids, borders, words, seeds_of(3))
    part = draw_masks(ids[40:], borders[1:] - 40, words, seeds_of(3)[1:])

    np.testing.assert_array_equal(part.encoder_ids, whole.encoder_ids[40:])
    np.testing.assert_array_equal(part.encoder_targets, whole.encoder_targets[whole.encoder_targets >= 40] - 40)
    np.testing.assert_array_equal(part.set_of_position, whole.set_of_position[40:])
    np.testing.assert_array_equal(part.hidden, whole.hidden[40 * 40 :])
    other = draw_masks(ids, borders, words, seeds_of(3, step=1))
    assert not np.array_equal(other.encoder_targets, whole.encoder_targets)


def test_whole_words_are_masked_and_hidden_whole() -> None:
    """All tokens of a word must be masked together, in the encoder and in each set of the decoder, which hides half of the words."""
    random = np.random.default_rng(3)
    words = WordVocabulary(np.arange(100) >= 50, np.arange(100) < 5, 4)
    ids = random.integers(5, 100, size=400)
    ids[[0, -1]] = 2, 3
    words_of = np.cumsum((ids < 50) | (np.arange(400) == 1))
    masks = draw_masks(ids, np.array([0, 400]), words, seeds_of(1))
    chosen = np.zeros(400, dtype=bool)
    chosen[masks.encoder_targets] = True
    hidden = masks.hidden.reshape(word_masking.SETS, 400)

    for word in np.unique(words_of[1:-1]):
        inside = np.flatnonzero(words_of[1:-1] == word) + 1
        assert len(set(chosen[inside])) == 1
        assert (hidden[:, inside] == hidden[:, inside[:1]]).all()
    assert not hidden[:, [0, -1]].any()
    assert hidden[:, 1:-1].mean() == pytest.approx(0.5, abs=0.02)


def test_words_of_vocabularies(build: Any) -> None:
    """## must continue a word in WordPiece and ▁ begin one in SentencePiece; Chinese characters, punctuation and byte-level pieces
    must each be a word."""
    spec = read_spec(str(build("bert")))
    pieces, words = vocabulary(spec), read_word_vocabulary(spec, 400)
    assert [piece.startswith("##") for piece in pieces] == words.continues[5:90].tolist()
    assert any(words.continues)
    assert words.special[[0, 1, 2, 3, 4, 399]].all()
    assert not words.special[5:90].any()

    spec = read_spec(str(build("xlm-roberta")))
    words = read_word_vocabulary(spec, 300)
    continues = dict(zip(vocabulary(spec), words.continues[5:90].tolist(), strict=True))
    assert not any(continues[piece] for piece in continues if piece[0] in "▁查询和文。,，")
    assert all(continues[piece] for piece in continues if piece.isascii() and piece.isalnum())
    assert not read_word_vocabulary(read_spec(str(build("roberta"))), 400).continues.any()

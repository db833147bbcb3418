"""Whole-word masks of RetroMAE, drawn by numpy from seeds of each text.

Masks depend on a text and its seeds alone, so they are the same in any chunk and on any rank. As in the authors' code the
encoder masks as BERT does (of the chosen tokens 80 % become [MASK], 10 % another token, 10 % stay), and the decoder draws
several sets of hidden words a text, of which each position uses one.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import ModelError
from ...models.packing import offsets_of
from ...models.spec import ModelSpec

ENCODER_SHARE, DECODER_SHARE = 0.3, 0.5  # of a text's tokens
MASKED, REPLACED = 0.8, 0.1  # of the encoder's chosen tokens
SETS = 128  # sets of hidden words a text; the authors draw up to 256. One for each position would cost too much
ENCODER, DECODER = 0, 1  # a text's two streams of random numbers
# Scripts without spaces: SentencePiece marks no word starts in them, so each piece counts as a word.
UNSPACED = ((0x0E00, 0x0EFF), (0x0F00, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))


@dataclass(frozen=True)
class WordVocabulary:
    """Which tokens of a vocabulary form words: bool [rows of the embedding table].

    continues: the token continues the word before it. special: never masked, never a replacement, never predicted; rows
    without a token are special too.
    """

    continues: np.ndarray
    special: np.ndarray
    mask_id: int

    @cached_property
    def words(self) -> np.ndarray:
        """Ids of all tokens that are not special, int64: the replacements."""
        return np.flatnonzero(~self.special)


@dataclass(frozen=True)
class Masks:
    """The masks of a batch, on the host.

    encoder_ids: int64 [tokens], the encoder's input. encoder_targets: int64 [chosen], positions that it predicts.
    decoder_targets: int64 [tokens of words], positions that the decoder predicts. hidden: bool, each text's [sets, length],
    concatenated: positions that the decoder does not attend to. set_of_position: int64 [tokens], the set of each position.
    """

    encoder_ids: np.ndarray
    encoder_targets: np.ndarray
    decoder_targets: np.ndarray
    hidden: np.ndarray
    set_of_position: np.ndarray


def read_word_vocabulary(spec: ModelSpec, size: int) -> WordVocabulary:
    """Read the words of WordPiece (##) and SentencePiece (▁) vocabularies; with another tokenizer each token is a word.

    size: rows of the embedding table. Raises ModelError for a tokenizer that cannot load or has no mask token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(spec.folder, trust_remote_code=False)
    except Exception as error:  # a broken vocabulary raises whatever its parser raises
        raise ModelError(f"The tokenizer in {spec.folder} cannot be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"The tokenizer of {spec.name} has no mask token, which RetroMAE needs. Choose a masked language model."
        )
    tokens = {number: token for token, number in tokenizer.get_vocab().items() if number < size}
    family = next((mark for mark in ("##", "▁") if any(token.startswith(mark) for token in tokens.values())), "")
    continues, special = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
    for number, token in tokens.items():
        continues[number], special[number] = _continues(token, family), False
    special[[number for number in tokenizer.all_special_ids if number < size]] = True
    return WordVocabulary(continues & ~special, special, int(tokenizer.mask_token_id))


def _continues(piece: str, family: str) -> bool:
    if family != "▁":
        return family == "##" and piece.startswith("##")
    first = ord(piece[0]) if piece else 0
    return piece[:1].isalnum() and not any(low <= first <= high for low, high in UNSPACED)


def draw_masks(ids: np.ndarray, borders: np.ndarray, vocabulary: WordVocabulary, seeds: np.ndarray) -> Masks:
    """Draw the masks of texts.

    ids: int [tokens], special tokens included. borders: int64 [texts + 1]; no text is without a token. seeds: integers >= 0
    [texts, any], such as the run's seed, the step and the row. A text's masks depend on its tokens and its seeds alone.
    """
    lengths = np.diff(borders)
    ends = offsets_of(np.minimum(lengths, SETS) * lengths)
    shown, targets = ids.astype(np.int64), [np.empty(0, dtype=np.int64)]
    hidden, set_of_position = np.zeros(ends[-1], dtype=bool), np.empty(borders[-1], dtype=np.int64)
    starts = _word_starts(ids, borders, vocabulary)
    for i, (first, end) in enumerate(pairwise(borders)):
        # Positions in the text of the tokens of words, and the number of each token's word, from 0.
        real = np.flatnonzero(~vocabulary.special[ids[first:end]])
        number = np.cumsum(starts[first:end])[real] - 1
        if len(real):
            random = np.random.default_rng([*seeds[i].tolist(), ENCODER])
            targets.append(first + _mask_encoder(shown[first:end], real, number, vocabulary, random))
        random = np.random.default_rng([*seeds[i].tolist(), DECODER])
        sets = min(int(lengths[i]), SETS)
        hidden_words = random.random((sets, number.max(initial=-1) + 1), dtype=np.float32) < DECODER_SHARE
        hidden[ends[i] : ends[i + 1]].reshape(sets, -1)[:, real] = hidden_words[:, number]
        set_of_position[first:end] = random.integers(sets, size=int(lengths[i]))
    return Masks(shown, np.concatenate(targets), np.flatnonzero(~vocabulary.special[ids]), hidden, set_of_position)


def _mask_encoder(
    shown: np.ndarray, real: np.ndarray, number: np.ndarray, vocabulary: WordVocabulary, random: np.random.Generator
) -> np.ndarray:
    """Mask one text, int64 [length], in place; returns the chosen positions, int64 [chosen].

    Whole words are chosen in random order until their tokens are closest to ENCODER_SHARE of the text; at least one.
    """
    sizes = np.bincount(number)
    order = random.permutation(len(sizes))
    middles = np.cumsum(sizes[order]) - sizes[order] / 2  # of each word: rounds to the nearest share
    words = np.zeros(len(sizes), dtype=bool)
    words[order[middles <= ENCODER_SHARE * len(real)]] = words[order[0]] = True
    chosen = real[words[number]]
    fate = random.random(len(chosen))
    shown[chosen[fate < MASKED]] = vocabulary.mask_id
    replaced = chosen[(fate >= MASKED) & (fate < MASKED + REPLACED)]
    shown[replaced] = vocabulary.words[random.integers(len(vocabulary.words), size=len(replaced))]
    return chosen


def _word_starts(ids: np.ndarray, borders: np.ndarray, vocabulary: WordVocabulary) -> np.ndarray:
    """Tokens at which a word starts: bool [tokens]."""
    special = vocabulary.special[ids]
    after = np.concatenate([[True], special[:-1]])[: len(ids)]
    after[borders[:-1]] = True
    return np.asarray(~special & (after | ~vocabulary.continues[ids]))

"""What RetroMAE hides of a text: whole words, drawn by numpy from seeds of the text's own.

So the masks are the same however the texts are cut into chunks and dealt to ranks. As in the authors' code the encoder's
are BERT's (of the chosen tokens 80 % become [MASK], 10 % another token, 10 % stay), and each position of the decoder takes
one of a text's sets of hidden words.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import ModelError, UsageError
from ...models.packing import offsets_of
from ...models.spec import ModelSpec

ENCODER_SHARE, DECODER_SHARE = 0.3, 0.5
MASKED, REPLACED = 0.8, 0.1  # of the encoder's chosen tokens
SETS = 128  # of hidden words a text; the authors draw up to 256, and one for each position would cost more still
ENCODER, DECODER = 0, 1  # the streams of random numbers of a text
# Scripts without spaces: SentencePiece marks no words in them, so a piece is one.
UNSPACED = ((0x0E00, 0x0EFF), (0x0F00, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))


@dataclass(frozen=True)
class Words:
    """What a vocabulary tells about words: bool [rows of the embedding table].

    continues: the piece goes on with the word before it. special: never masked, shown or predicted as a word; rows that no
    token has are special too.
    """

    continues: np.ndarray
    special: np.ndarray
    mask_id: int


@dataclass(frozen=True)
class Drawn:
    """The masks of a batch, on the host.

    ids: int64 [tokens], what the encoder sees. places: int64 [chosen], which of them it must tell. told: int64 [words'
    tokens], which the decoder must tell. hidden: bool, a text after the other [sets, length], what the decoder does not
    see. choice: int64 [tokens], the set of each position.
    """

    ids: np.ndarray
    places: np.ndarray
    told: np.ndarray
    hidden: np.ndarray
    choice: np.ndarray


def read_words(spec: ModelSpec, vocabulary: int) -> Words:
    """Words of WordPiece (##) and SentencePiece (▁) vocabularies; with another tokenizer each token is a word.

    vocabulary: rows of the embedding table. Raises ModelError for a tokenizer that cannot load or has no mask token.
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
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items() if number < vocabulary}
    family = next((mark for mark in ("##", "▁") if any(p.startswith(mark) for p in pieces.values())), "")
    continues, special = np.zeros(vocabulary, dtype=bool), np.ones(vocabulary, dtype=bool)
    for number, piece in pieces.items():
        continues[number], special[number] = _continues(piece, family), False
    special[[number for number in tokenizer.all_special_ids if number < vocabulary]] = True
    return Words(continues & ~special, special, int(tokenizer.mask_token_id))


def _continues(piece: str, family: str) -> bool:
    if family != "▁":
        return family == "##" and piece.startswith("##")
    first = ord(piece[0]) if piece else 0
    return piece[:1].isalnum() and not any(low <= first <= high for low, high in UNSPACED)


def draw(ids: np.ndarray, borders: np.ndarray, words: Words, seeds: np.ndarray) -> Drawn:
    """The masks of the texts.

    ids: int [tokens], special tokens included. borders: int64 [texts + 1]. seeds: integers >= 0 [texts, any], such as the
    run's seed, the step and the row: all that a text's masks depend on besides its tokens.
    Raises UsageError for a text without tokens, or another number of seeds than texts.
    """
    if len(seeds) != len(borders) - 1 or (np.diff(borders) < 1).any():
        raise UsageError(
            f"{len(seeds)} seeds for {len(borders) - 1} texts of {np.diff(borders).min(initial=0)} tokens and more. Give a "
            "row of seeds a text, and texts with their special tokens."
        )
    masked, places = mask(ids, borders, words, ENCODER_SHARE, seeds)
    hidden, choice = hide(ids, borders, words, DECODER_SHARE, seeds)
    return Drawn(masked, places, np.flatnonzero(~words.special[ids]), hidden, choice)


def mask(
    ids: np.ndarray, borders: np.ndarray, words: Words, share: float, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder sees, int64 [tokens], and the places of the tokens that were chosen, int64 [chosen].

    Of each text whole words are chosen in random order until their tokens are nearest to `share` of it; at least one.
    """
    shown, chosen = ids.astype(np.int64), []
    starts, others = _starts(ids, borders, words), np.flatnonzero(~words.special)
    for i, (first, end) in enumerate(pairwise(borders)):
        real, number = _numbered(ids, starts, words, first, end)
        if not len(real):
            continue
        random = np.random.default_rng([*seeds[i].tolist(), ENCODER])
        sizes = np.bincount(number)
        order = random.permutation(len(sizes))
        reached = np.cumsum(sizes[order]) - sizes[order] / 2  # half of a word counts, or all texts would get too much
        taken = np.zeros(len(sizes), dtype=bool)
        taken[order[reached <= share * len(real)]] = taken[order[0]] = True
        places = first + real[taken[number]]
        fate = random.random(len(places))
        shown[places[fate < MASKED]] = words.mask_id
        replaced = places[(fate >= MASKED) & (fate < MASKED + REPLACED)]
        shown[replaced] = others[random.integers(len(others), size=len(replaced))]
        chosen.append(places)
    return shown, np.concatenate([*chosen, np.empty(0, dtype=np.int64)]).astype(np.int64)


def hide(
    ids: np.ndarray, borders: np.ndarray, words: Words, share: float, seeds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sets of hidden words of each text and the set of each position, see Drawn; special tokens are always seen."""
    starts, lengths = _starts(ids, borders, words), np.diff(borders)
    ends = offsets_of(np.minimum(lengths, SETS) * lengths)
    hidden, choice = np.zeros(ends[-1], dtype=bool), np.empty(borders[-1], dtype=np.int64)
    for i, (first, end) in enumerate(pairwise(borders)):
        real, number = _numbered(ids, starts, words, first, end)
        random = np.random.default_rng([*seeds[i].tolist(), DECODER])
        sets = min(int(lengths[i]), SETS)
        out = random.random((sets, int(number[-1]) + 1 if len(number) else 0), dtype=np.float32) < share
        hidden[ends[i] : ends[i + 1]].reshape(sets, -1)[:, real] = out[:, number]
        choice[first:end] = random.integers(sets, size=int(lengths[i]))
    return hidden, choice


def _starts(ids: np.ndarray, borders: np.ndarray, words: Words) -> np.ndarray:
    """Whether a word begins at the token: bool [tokens]."""
    special = words.special[ids]
    after = np.concatenate([[True], special[:-1]])[: len(ids)]
    after[borders[:-1]] = True
    return np.asarray(~special & (after | ~words.continues[ids]))


def _numbered(ids: np.ndarray, starts: np.ndarray, words: Words, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in the text of the tokens of words, and the word of each, from 0."""
    real = np.flatnonzero(~words.special[ids[first:end]])
    return real, np.cumsum(starts[first:end])[real] - 1

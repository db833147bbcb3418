"""Chunks of a long text: which characters each one has, by the tokens of the whole text. numpy only."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# First and last code points of scripts without spaces: Thai and Lao, Burmese, Khmer, and CJK with all behind it.
UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x10FFFF))
SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)


@dataclass(frozen=True)
class TokenizedText:
    """A text and the characters of each of its tokens.

    A cut is possible before token i where no character belongs to tokens on both sides (a byte-level tokenizer has
    several for one emoji). It is clean where the two sides do not make a word; white space that has a token of its own
    goes with what follows.

    starts, ends: int64 [tokens]. possible, clean: bool [tokens + 1], of a cut before each token, and after the last.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray
    possible: np.ndarray
    clean: np.ndarray

    @classmethod
    def of(cls, text: str, spans: np.ndarray) -> "TokenizedText":
        """`spans`: int [tokens, 2], the first character of each token and the one behind its last."""
        starts, ends = spans[:, 0], np.maximum.accumulate(spans[:, 1])
        possible = np.concatenate([[True], (starts[1:] >= ends[:-1]) & (starts[1:] > starts[:-1]), [True]])
        codes = np.frombuffer((text + " ").encode("utf-32-le", "surrogatepass"), np.uint32)
        space = np.isin(codes, SPACES)
        apart = space | np.any([(low <= codes) & (codes <= high) for low, high in UNSPACED], axis=0)
        has_text = (spans[:, 0] < spans[:, 1]) & ~space[spans[:, 1] - 1]
        between_words = has_text[:-1] & (apart[starts[1:] - 1] | apart[starts[1:]])
        return cls(text, starts, ends, possible, possible & np.concatenate([[True], between_words, [True]]))

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.starts)

    def cut_from(self, token: int) -> int:
        """The first possible cut at or after `token`."""
        return token + int(np.argmax(self.possible[token:]))

    def end_of_chunk(self, first: int, size: int, overlap: int) -> int:
        """The cut, at most `size` tokens after the one at `first`, that ends a chunk; the next possible one where there is none.

        The greatest from which the next chunk, `overlap` tokens before, begins cleanly too; then the greatest clean one;
        neither makes a chunk of less than half the size.
        """
        if first + size >= len(self):
            return len(self)
        cuts = np.arange(first + overlap + 1, first + size + 1)
        if not len(cuts := cuts[self.possible[cuts] & self.possible[cuts - overlap]]):
            return self.cut_from(first + 1)
        large = cuts[cuts > first + size // 2]
        both = large[self.clean[large] & self.clean[large - overlap]]
        return int(next(each for each in (both, large[self.clean[large]], cuts) if len(each))[-1])

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) of tokens `first` to `last`, without the white space before what follows."""
        start = int(self.starts[first]) if first else 0
        if last == len(self):
            return start, len(self.text)
        return start, start + len(self.text[start : self.starts[last]].rstrip())


def chunk_spans(
    text: str, spans: np.ndarray, size: int, overlap: int, count: Callable[[str], int]
) -> list[tuple[int, int]]:
    """(start, end) characters of chunks of at most `size` tokens; each begins `overlap` tokens before the end of the last one.

    Together they have every character but white space between them. A cut inside a word, which there may be where a
    word is longer than half a chunk, can change the tokens beside it: `count` gives the tokens of a piece, and a chunk
    that has too many is made shorter. Only what cannot be cut, a character of more than `size` tokens, stays longer.

    spans: int [tokens, 2], the characters of each token of the whole text. overlap: less than `size`.
    """
    if len(spans) <= size and count(text) <= size:
        return [(0, len(text))]
    chunks: list[tuple[int, int]] = []
    whole, first, last = TokenizedText.of(text, spans), 0, 0
    while last < len(whole):
        end, characters = _chunk(whole, first, size, overlap, count)
        if end <= last:  # so short that the chunk before has it all: share less
            first = whole.cut_from(first + 1)
            continue
        if characters[1] > max(
            characters[0], chunks[-1][1] if chunks else 0
        ):  # else white space with tokens of its own
            chunks.append(characters)
        first, last = whole.cut_from(max(end - overlap, first + 1)), end
    return chunks


def _chunk(
    whole: TokenizedText, first: int, size: int, overlap: int, count: Callable[[str], int]
) -> tuple[int, tuple[int, int]]:
    """The cut behind the chunk that begins at token `first`, and the chunk's characters."""
    room = size
    while True:
        last = whole.end_of_chunk(first, room, min(overlap, room - 1))
        start, end = whole.characters(first, last)
        excess = count(whole.text[start:end]) - size
        if excess <= 0 or room == 1 or last - first > room:
            return last, (start, end)
        room = max(1, last - first - excess)

"""Chunks of long texts against their contract, for every sort of tokenizer."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lib.data.chunks import chunk_spans
from tests.support import tiny_tokenizers

TOKENIZERS = {kind.__name__: kind().backend_tokenizer for kind in (
    tiny_tokenizers.word_piece, tiny_tokenizers.unigram, tiny_tokenizers.byte_level, tiny_tokenizers.qwen,
    tiny_tokenizers.gemma,
)}  # fmt: skip
PIECES = st.sampled_from([
    "标题", "查询和文档分别编码", "向量。", "\n", "\n\n\n", " ", "   ", "fish", "documents ", "lazy dogs; ", "Größe", "naïve café",
    "https://a.example/b?c=d&e=%20f", "\N{FAMILY}", "👩\u200d👩\u200d👧", "🐟", "ﷺ", "한국어 문장", "ภาษาไทย", "\u200b", "x" * 40,
    "e\u0301", "\x07",
])  # fmt: skip
TEXTS = st.lists(PIECES, min_size=1, max_size=60).map(lambda pieces: "".join(pieces).strip()).filter(bool)


def counts(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def spans_of(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXTS, size=st.integers(24, 60), overlap=st.integers(0, 23))
def test_contract(kind, text, size, overlap):
    """Chunks cover the text; tokenised again none has more than `size` tokens; they are disjoint without an overlap and
    share at most the overlap's tokens with one."""
    tokenizer = TOKENIZERS[kind]
    spans = spans_of(tokenizer, text)

    chunks = chunk_spans(text, spans, size, overlap, lambda piece: counts(tokenizer, piece))

    covered = np.zeros(len(text), bool)
    for start, end in chunks:
        assert text[start:end].strip()
        assert counts(tokenizer, text[start:end]) <= size
        covered[start:end] = True
    assert not "".join(letter for letter, inside in zip(text, covered, strict=True) if not inside).strip()
    for (start, end), (next_start, next_end) in itertools.pairwise(chunks):
        assert start < next_start
        assert end < next_end
        shared = (spans[:, 0] >= next_start) & (spans[:, 1] <= end) & (spans[:, 0] < spans[:, 1])
        assert shared.sum() <= overlap
        assert overlap or end <= next_start


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("overlap", [0, 1, 7, 20])
@pytest.mark.parametrize(
    "words", ["标题\n" + "查询和文档分别编码向量相似度决定排序" * 40, "the quick brown fox jumps over lazy dogs " * 40]
)
def test_share_exactly_the_overlap(kind, overlap, words):
    """Where every word can be cut off, each chunk but the last is more than half full, and shares just the overlap's tokens."""
    tokenizer, size = TOKENIZERS[kind], 60
    spans = spans_of(tokenizer, words.strip())

    chunks = chunk_spans(words.strip(), spans, size, overlap, lambda piece: counts(tokenizer, piece))

    shared = [
        ((spans[:, 0] >= start) & (spans[:, 1] <= end)).sum() for (_, end), (start, _) in itertools.pairwise(chunks)
    ]
    sizes = [counts(tokenizer, words[start:end]) for start, end in chunks]
    assert set(shared) == {overlap}
    assert min(sizes[:-1]) > size * 0.5

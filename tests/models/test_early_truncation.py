"""Early truncation: cuts that cannot change a token before them."""

import json
from typing import Any

import pytest

from lib.models import early_truncation
from tests.models.test_tokenizer import difficult_texts
from tests.support import tiny


@pytest.mark.parametrize("make", [tiny.word_piece, tiny.unigram, tiny.byte_level, tiny.qwen])
def test_tokens_of_a_cut_text_are_a_prefix_of_those_of_the_whole(make: Any) -> None:
    """A cut by truncate_early never changes a token before it, on texts written to break it."""
    backend = make().backend_tokenizer
    assert early_truncation.is_local(json.loads(backend.to_str()))
    cuts = 0
    for text in difficult_texts(50):
        whole = backend.encode(text, add_special_tokens=False).ids
        for characters in range(0, len(text), max(1, len(text) // 10)):
            head = early_truncation.truncate_early(text, characters)
            ids = backend.encode(head, add_special_tokens=False).ids
            cuts += len(head) < len(text)
            assert ids == whole[: len(ids)]

    assert cuts > 300


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "UnicodeScripts"}]}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}},
        {"added_tokens": [{"content": "two words"}]},
    ],
)
def test_tokenizers_that_look_across_spaces_are_not_cut(change: dict[str, Any]) -> None:
    """A tokenizer with a step that can join the two sides of a space is not local, so its texts stay whole."""
    plain = {"added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}

    assert early_truncation.is_local(plain)
    assert not early_truncation.is_local(plain | change)

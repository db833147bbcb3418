"""Where an over-long text may be cut before tokenising, so that the tokens that are kept cannot change.

A model keeps the first few hundred tokens of a text; tokenising the rest of a book costs far more than the model does.
A cut is made only before an ASCII space that has an ASCII letter or digit on both sides, and only for tokenizers whose
every step works inside stretches that end there. The tokens of the cut text are then a prefix of the tokens of the
whole: when there are more of them than the model keeps, the kept ones are exact.
"""

import re
from collections.abc import Mapping
from typing import Any

CUT = re.compile(r"(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])", re.ASCII)

# Steps that never look across such a space. Split and Replace depend on their patterns, Metaspace on its option.
LOCAL_NORMALIZERS = frozenset(
    {
        "BertNormalizer",
        "ByteLevel",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Strip",
        "StripAccents",
    }
)
LOCAL_PRE_TOKENIZERS = frozenset(
    {"BertPreTokenizer", "Digits", "Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
)
# Patterns of Split that begin a new piece at the space: those of GPT-2, Llama 3 and Qwen 2, 2.5 and 3. In them no branch
# matches a letter or digit followed by a space, and only runs of whitespace look ahead.
LOCAL_SPLITS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
LOCAL_REPLACE = re.compile(r" \{2,\}|[^\\]", re.DOTALL)  # two or more spaces, or a single character


def is_local(tokenizer: Mapping[str, Any]) -> bool:
    """Whether cutting is exact for this tokenizer, given its tokenizer.json as parsed JSON."""
    added = (token["content"] for token in tokenizer.get("added_tokens", ()))
    if any(re.search(r"[\s\u2581]", content) for content in added):
        return False
    splitter = tokenizer.get("pre_tokenizer")
    return _local_normalizer(tokenizer.get("normalizer")) and splitter is not None and _local_pre_tokenizer(splitter)


def cut(text: str, characters: int) -> str:
    """The text up to the first allowed place at or after `characters`; the whole text where there is none."""
    found = CUT.search(text, characters)
    return text[: found.start()] if found else text


def _local_normalizer(step: Mapping[str, Any] | None) -> bool:
    if step is None:
        return True
    if step["type"] == "Sequence":
        return all(_local_normalizer(inner) for inner in step["normalizers"])
    if step["type"] == "Replace":
        return LOCAL_REPLACE.fullmatch(next(iter(step["pattern"].values()))) is not None
    return step["type"] in LOCAL_NORMALIZERS


def _local_pre_tokenizer(step: Mapping[str, Any]) -> bool:
    """A sequence is local when each of its steps leaves the space a border or untouched, and one makes it a border."""
    if step["type"] == "Sequence":
        steps = step["pretokenizers"]
        return all(_local_pre_tokenizer(inner) or _only_bytes(inner) for inner in steps) and not all(
            map(_only_bytes, steps)
        )
    if step["type"] == "Metaspace":
        return bool(step.get("split", True))
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] == "Split":
        return step["pattern"].get("Regex") in LOCAL_SPLITS and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] in LOCAL_PRE_TOKENIZERS


def _only_bytes(step: Mapping[str, Any]) -> bool:
    """ByteLevel without its own splitting: it renames bytes inside the pieces that it is given."""
    return step["type"] == "ByteLevel" and not step.get("use_regex", True)

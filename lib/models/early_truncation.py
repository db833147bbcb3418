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
BORDERS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})  # of these each splits at every space
INSIDE = frozenset({"Digits", "Punctuation"})  # and these only split further what they are given
# Patterns of Split that begin a new piece at the space: GPT-2, and Llama 3 and Qwen 2 to 3, which differ in how many
# digits a piece has. No branch matches a letter or digit followed by a space; only runs of whitespace look ahead.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOCAL_SPLITS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        LLAMA.replace("DIGITS", r"\p{N}{1,3}"),
        LLAMA.replace("DIGITS", r"\p{N}"),
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


def truncate_early(text: str, characters: int) -> str:
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
    """Whether the step makes every such space a border. In a sequence one step must; the others only split further."""
    if step["type"] == "Sequence":
        steps = step["pretokenizers"]
        borders = [inner for inner in steps if not _splits_further(inner)]
        return bool(borders) and all(map(_local_pre_tokenizer, borders))
    if step["type"] == "Metaspace":
        return bool(step.get("split", True))
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] == "Split":
        return step["pattern"].get("Regex") in LOCAL_SPLITS and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] in BORDERS


def _splits_further(step: Mapping[str, Any]) -> bool:
    """ByteLevel without its own pattern renames bytes and splits nothing."""
    return step["type"] in INSIDE or (step["type"] == "ByteLevel" and not step.get("use_regex", True))

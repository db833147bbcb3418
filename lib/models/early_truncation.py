"""Early truncation: cut over-long texts before tokenising, where the cut cannot change the tokens that the model keeps.

A model keeps the first few hundred tokens of a text, and tokenising the rest of a book costs far more than the model does.
A text is cut only before an ASCII space between two ASCII letters or digits, and only for tokenizers whose every step
works inside stretches that end at such a space. The tokens of the cut text are then a prefix of the tokens of the whole
text. When this prefix is longer than what the model keeps, the kept tokens are exact.
"""

import re
from collections.abc import Mapping
from typing import Any

CUT_POINT = re.compile(r"(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])", re.ASCII)

# Normalizers that never look across such a space. Split and Replace depend on their patterns, Metaspace on its option.
LOCAL_NORMALIZERS = {
    *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD"),
    *("Nmt", "Precompiled", "Prepend", "Strip", "StripAccents"),
}
SPLIT_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}  # each of these splits at every space
SPLIT_FURTHER = {"Digits", "Punctuation"}  # these only split their input further
# Patterns of Split that start a new word at the space: GPT-2, and Llama 3 and Qwen 2 to 3, which differ in the number of
# digits a word has. No branch matches a letter or digit followed by a space; only runs of whitespace look ahead.
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOCAL_SPLITS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        LLAMA_PATTERN.replace("DIGITS", r"\p{N}{1,3}"),
        LLAMA_PATTERN.replace("DIGITS", r"\p{N}"),
    }
)
LOCAL_REPLACE = re.compile(r" \{2,\}|[^\\]", re.DOTALL)  # two or more spaces, or a single character


def is_local(tokenizer: Mapping[str, Any]) -> bool:
    """Return whether cutting is exact for this tokenizer. tokenizer: its tokenizer.json as parsed JSON."""
    added = (token["content"] for token in tokenizer.get("added_tokens", ()))
    if any(re.search(r"[\s\u2581]", content) for content in added):
        return False
    splitter = tokenizer.get("pre_tokenizer")
    return _local_normalizer(tokenizer.get("normalizer")) and splitter is not None and _local_pre_tokenizer(splitter)


def truncate_early(text: str, characters: int) -> str:
    """Cut the text at the first allowed place at or after `characters`; return it whole where there is none."""
    cut = CUT_POINT.search(text, characters)
    return text[: cut.start()] if cut else text


def _local_normalizer(step: Mapping[str, Any] | None) -> bool:
    """Return whether the normalizer never looks across such a space."""
    if step is None:
        return True
    if step["type"] == "Sequence":
        return all(_local_normalizer(inner) for inner in step["normalizers"])
    if step["type"] == "Replace":
        return LOCAL_REPLACE.fullmatch(next(iter(step["pattern"].values()))) is not None
    return step["type"] in LOCAL_NORMALIZERS


def _local_pre_tokenizer(step: Mapping[str, Any]) -> bool:
    """Return whether the step splits at every such space. In a sequence one step must; the others only split further."""
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
    return step["type"] in SPLIT_AT_SPACES


def _splits_further(step: Mapping[str, Any]) -> bool:
    """Return whether the step only splits further. ByteLevel without its own pattern maps bytes and splits nothing."""
    return step["type"] in SPLIT_FURTHER or (step["type"] == "ByteLevel" and not step.get("use_regex", True))

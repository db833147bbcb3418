"""Texts of exactly so many tokens: words of one token each, with their ids, for whoever takes texts or tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from lib.models.spec import ModelSpec, Tokens
from lib.models.tokenizer import Tokenizer


@dataclass
class Corpus:
    """Texts and their tokens, ready for both sides."""

    name: str
    texts: list[str]
    tokens: Tokens

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.tokens.offsets)

    def head(self, count: int) -> "Corpus":
        ids, offsets, truncated = self.tokens
        cut = Tokens(ids[: offsets[count]], offsets[: count + 1], truncated[:count])
        return Corpus(self.name, self.texts[:count], cut)


def single_words(path: Path) -> list[str]:
    """Words of the vocabulary that are one token wherever they stand."""
    vocabulary = json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return [word for word in vocabulary if word.isascii() and word.isalnum() and len(word) > 1]


def corpora(path: Path, spec: ModelSpec, longest: int, tokens: int) -> list[Corpus]:
    """Mixed lengths (log-normal, 5 to 400 tokens), and all of one length."""
    random = np.random.default_rng(7)
    long = min(longest, spec.max_tokens)
    mixed = np.clip(random.lognormal(np.log(30), 1.0, tokens // 45), 5, min(400, spec.max_tokens)).astype(int)
    words, tokenizer = np.array(single_words(path)), Tokenizer(spec)
    made = []
    for name, lengths in (("5-400 tokens, mixed", mixed), (f"{long} tokens", np.full(tokens // long, long))):
        texts = [" ".join(random.choice(words, length - tokenizer.special)) for length in lengths]
        found = tokenizer(texts)
        if not np.array_equal(np.diff(found.offsets), lengths):
            raise click.ClickException(f"{spec.name}: its words are not of one token each")
        made.append(Corpus(name, texts, found))
    return made

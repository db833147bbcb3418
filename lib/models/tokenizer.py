"""Texts to flat token ids, those of sentence-transformers for the same directory, without padding or tensors."""

import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..errors import ModelError
from . import early_truncation
from .packing import offsets_of
from .spec import ModelSpec, Tokens

# Characters of a long text tokenised at first, for each token kept; English has 4 to 5 a token, so one pass is usual.
CHARACTERS_A_TOKEN = 6
TEXTS_AT_ONCE = 512  # whose encodings are held, of some 150 bytes a token
PROBES = ("a", "0", "的", "?")


class Tokenizer:
    """The tokenizer of a model directory.

    special: special tokens added to every text. limit: tokens of the text itself that fit beside them. max_tokens: both.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Load the tokenizer (seconds for a large vocabulary). Raises ModelError when it cannot serve the spec."""
        self._spec = spec
        self._hf = _load(spec)
        self._content: Callable[[Sequence[str]], list[list[int]]] = self._content_slow
        self._cuts = False
        if self._hf.is_fast:
            self._backend = self._hf.backend_tokenizer
            self._backend.no_padding()
            self._backend.no_truncation()
            if spec.lower_case:
                _lower_case(self._backend)
            self._content = self._content_fast
            self._cuts = early_truncation.is_local(json.loads(self._backend.to_str()))
        self._from_the_left = self._hf.truncation_side == "left"
        self._head, self._tail = self._special_tokens()
        self.special = len(self._head) + len(self._tail)
        self.limit = spec.max_tokens - self.special
        self.max_tokens = spec.max_tokens
        if self.limit < 1:
            raise ModelError(
                f"max_tokens={spec.max_tokens} leaves no room beside {self.special} special tokens. Ask for more."
            )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenise, cut to the model's length, and add the special tokens. A prompt must already be in the texts."""
        pieces = self._tokenise(texts)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        kept = np.minimum(lengths, self.limit)
        offsets = offsets_of(kept + self.special)
        ids = np.empty(offsets[-1], dtype=np.int32)
        inside = np.ones(offsets[-1], dtype=bool)
        for places, token in self._special_places(offsets):
            ids[places], inside[places] = token, False
        ids[inside] = np.fromiter(chain.from_iterable(map(self._cut, pieces)), np.int32, int(kept.sum()))
        return Tokens(ids, offsets, lengths > self.limit)

    def contents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens; of a text longer than the model takes maybe only a longer prefix."""
        return self._tokenise(texts) if len(texts) else []

    def pair(self, left: str, right: str) -> dict[str, list[int]]:
        """A pair as the tokenizer itself joins it: `input_ids` and, for models that have them, `token_type_ids`."""
        return dict(self._hf(left, right))

    @property
    def special_ids(self) -> set[int]:
        """Ids that stand for no word: those put before and after a text, padding, unknown."""
        others = {self._hf.pad_token_id, self._hf.unk_token_id} - {None}
        return {*self._head, *self._tail, *others}

    def prompt_tokens(self, prompt: str | None) -> int:
        """Tokens at the head of every text that pooling must skip when `prompt` is put before it; 0 if it need not."""
        if not prompt or self._spec.include_prompt:
            return 0
        ids = self([prompt]).ids
        return len(ids) - int(len(ids) > 0 and int(ids[-1]) in self._hf.all_special_ids)

    def spans(self, text: str) -> np.ndarray:
        """Characters that each token of the whole text covers, special tokens left out: int64 [tokens, 2].

        Raises ModelError for a tokenizer without offsets.
        """
        if not self._hf.is_fast:
            raise ModelError(
                f"The tokenizer of {self._spec.name} knows no character offsets, so texts cannot be chunked by it."
            )
        return np.array(self._backend.encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)

    def _special_places(self, offsets: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Each special token with its place in every text."""
        before = [(offsets[:-1] + i, token) for i, token in enumerate(self._head)]
        return before + [(offsets[1:] - 1 - i, token) for i, token in enumerate(reversed(self._tail))]

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.limit:
            return ids
        return ids[-self.limit :] if self._from_the_left else ids[: self.limit]

    def _tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens; of an over-long text maybe only a prefix above the limit."""
        characters = self.limit * CHARACTERS_A_TOKEN
        if not self._cuts or self._from_the_left:
            return self._content(texts)
        heads = [
            text if len(text) <= characters else early_truncation.truncate_early(text, characters) for text in texts
        ]
        pieces = self._content(heads)
        for i, text in enumerate(texts):
            reach = characters
            while len(heads[i]) < len(text) and len(pieces[i]) <= self.limit:
                reach = 2 * max(reach, len(heads[i]))
                heads[i] = early_truncation.truncate_early(text, reach)
                pieces[i] = self._content([heads[i]])[0]
        return pieces

    def _content_fast(self, texts: Sequence[str]) -> list[list[int]]:
        """encode_batch_fast: a third of the time of the tokenizer's own __call__, and the same ids."""
        found: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = list(texts[start : start + TEXTS_AT_ONCE])
            found += [encoding.ids for encoding in self._backend.encode_batch_fast(some, add_special_tokens=False)]
        return found

    def _content_slow(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenizers written in Python have no such backend."""
        return self._hf(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after every text, found by comparing a short text with and without."""
        for probe in PROBES:
            bare = self._content([probe])[0]
            whole = self._hf(probe, return_token_type_ids=True)
            if bare:
                break
        ids, kinds = whole["input_ids"], whole.get("token_type_ids", [0])
        starts = [i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare]
        if not bare or len(starts) != 1 or any(kinds):
            raise ModelError(
                f"The tokenizer of {self._spec.name} adds special tokens in a way that Shoal does not follow: {ids}."
            )
        head, tail = ids[: starts[0]], ids[starts[0] + len(bare) :]
        end = self._hf.eos_token_id
        if self._spec.append_eos and end is None:
            raise ModelError(
                f"append_eos is asked for, but the tokenizer of {self._spec.name} has no end-of-sequence token."
            )
        return head, [*tail, end] if self._spec.append_eos and tail[-1:] != [end] else tail


def _load(spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.folder, model_max_length=spec.max_tokens, trust_remote_code=False)
    except Exception as error:  # a broken vocabulary raises whatever its parser raises
        raise ModelError(f"The tokenizer in {spec.folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _lower_case(backend: Any) -> None:
    """do_lower_case as sentence-transformers applies it: before the tokenizer's own normalisation, once."""
    from tokenizers.normalizers import Lowercase, Sequence

    own: Any = backend.normalizer
    several = isinstance(own, Sequence)
    steps = list(own) if several else [own] if own is not None else []
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])

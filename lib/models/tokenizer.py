"""Tokenizer: texts to flat token ids, equal to those of sentence-transformers, without padding or tensors."""

import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..errors import ModelError, UsageError
from . import early_truncation
from .packing import offsets_of
from .spec import ModelSpec, Tokens

# Characters of a long text that the first pass tokenises, for each token of the limit. English has 4 to 5 characters a
# token, so one pass is usual.
CHARACTERS_A_TOKEN = 6
TEXTS_AT_ONCE = 512  # texts a call: their encodings take some 150 bytes a token
# Texts of which one at least has a token of its own in every vocabulary.
PROBES = ("a", "0", "的", "?")


class Tokenizer:
    """The tokenizer of a model directory.

    special: number of special tokens in every text. limit: most tokens of the text itself. max_tokens: their sum.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Load the tokenizer, in seconds for a large vocabulary. Raises ModelError when it does not fit the spec."""
        self._spec = spec
        self._hf = _load(spec)
        self._content: Callable[[Sequence[str]], list[list[int]]] = self._content_slow
        self._can_truncate_early = False
        if self._hf.is_fast:
            self._backend = self._hf.backend_tokenizer
            self._backend.no_padding()
            self._backend.no_truncation()
            if spec.lower_case:
                _lower_case(self._backend)
            self._content = self._content_fast
            self._can_truncate_early = early_truncation.is_local(json.loads(self._backend.to_str()))
        self._truncates_left = self._hf.truncation_side == "left"
        self._head, self._tail = self._special_tokens()
        self.special = len(self._head) + len(self._tail)
        self.limit = spec.max_tokens - self.special
        self.max_tokens = spec.max_tokens
        if self.limit < 1:
            raise ModelError(
                f"max_tokens={spec.max_tokens} leaves no room beside {self.special} special tokens. Use a larger max_tokens."
            )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenise, truncate to the model's length, and add the special tokens. The texts include their prompt."""
        contents = self.contents(texts)
        lengths = np.fromiter(map(len, contents), np.int64, len(contents))
        kept_lengths = np.minimum(lengths, self.limit)
        offsets = offsets_of(kept_lengths + self.special)
        ids = np.empty(offsets[-1], dtype=np.int32)
        inside = np.ones(offsets[-1], dtype=bool)
        for places, token in self._special_places(offsets):
            ids[places], inside[places] = token, False
        ids[inside] = np.fromiter(chain.from_iterable(map(self._truncate, contents)), np.int32, int(kept_lengths.sum()))
        return Tokens(ids, offsets, lengths > self.limit)

    def tokens_of_prompt(self, prompt: str) -> int:
        """The tokens of a prompt. Raises UsageError where it leaves none for a text."""
        count = len(self.contents([prompt])[0]) if prompt else 0
        if count >= self.limit:
            raise UsageError(
                f"the prompt {prompt[:40]!r} leaves no token for a text: the limit is {self.limit + self.special} tokens, "
                f"{self.special} special ones among them. Shorten the prompt, or raise the limit"
            )
        return count

    def contents(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise without special tokens. The ids of an over-long text may be a prefix, of more tokens than the limit."""
        characters = self.limit * CHARACTERS_A_TOKEN
        if not self._can_truncate_early or self._truncates_left:
            return self._content(texts)
        heads = [early_truncation.truncate_early(text, characters) for text in texts]
        contents = self._content(heads)
        for i, text in enumerate(texts):
            characters_tried = characters
            while len(heads[i]) < len(text) and len(contents[i]) <= self.limit:
                characters_tried = 2 * max(characters_tried, len(heads[i]))
                heads[i] = early_truncation.truncate_early(text, characters_tried)
                contents[i] = self._content([heads[i]])[0]
        return contents

    def pair(self, left: str, right: str) -> dict[str, list[int]]:
        """Join a pair as the tokenizer does: `input_ids` and, for models that have them, `token_type_ids`."""
        return dict(self._hf(left, right))

    @property
    def special_ids(self) -> set[int]:
        """The ids of no word: the special tokens before and after a text, padding, unknown."""
        others = {self._hf.pad_token_id, self._hf.unk_token_id} - {None}
        return {*self._head, *self._tail, *others}

    def prompt_tokens(self, prompt: str | None) -> int:
        """Count the tokens at the start of every text that pooling skips for `prompt`; 0 where it pools the prompt."""
        if not prompt or self._spec.include_prompt:
            return 0
        ids = self([prompt]).ids
        return len(ids) - int(len(ids) > 0 and int(ids[-1]) in self._hf.all_special_ids)

    def spans(self, text: str) -> np.ndarray:
        """Return the range of characters of each token of the whole text, without special tokens: int64 [tokens, 2].

        Raises ModelError for a tokenizer without offsets.
        """
        if not self._hf.is_fast:
            raise ModelError(
                f"The tokenizer of {self._spec.name} knows no character offsets, so texts cannot be chunked by it."
            )
        return np.array(self._backend.encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)

    def _special_places(self, offsets: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Return each special token with its position in every text."""
        before = [(offsets[:-1] + i, token) for i, token in enumerate(self._head)]
        return before + [(offsets[1:] - 1 - i, token) for i, token in enumerate(reversed(self._tail))]

    def _truncate(self, ids: list[int]) -> list[int]:
        """Cut ids to the limit, on the tokenizer's truncation side."""
        if len(ids) <= self.limit:
            return ids
        return ids[-self.limit :] if self._truncates_left else ids[: self.limit]

    def _content_fast(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise by encode_batch_fast: the same ids in a third of the time of the tokenizer's own __call__."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            batch = list(texts[start : start + TEXTS_AT_ONCE])
            ids += [encoding.ids for encoding in self._backend.encode_batch_fast(batch, add_special_tokens=False)]
        return ids

    def _content_slow(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise by the plain call, for tokenizers written in Python, which have no backend."""
        return self._hf(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Read the ids before and after every text, by tokenising a short text with and without special tokens."""
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
            raise ModelError(f"append_eos=True, but the tokenizer of {self._spec.name} has no end-of-sequence token.")
        return head, [*tail, end] if self._spec.append_eos and tail[-1:] != [end] else tail


def _load(spec: ModelSpec) -> Any:
    """Load transformers' tokenizer of the spec. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.folder, model_max_length=spec.max_tokens, trust_remote_code=False
        )
    except Exception as error:  # a broken vocabulary raises whatever its parser raises
        raise ModelError(f"The tokenizer in {spec.folder} cannot be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.is_fast and spec.vocabulary and len(tokenizer) > spec.vocabulary:
        _drop_tokens(tokenizer, spec.vocabulary)
    return tokenizer


def _drop_tokens(tokenizer: Any, rows: int) -> None:
    """Make the added tokens of images and sounds, which have no row in the embedding table, letters like any others."""
    from tokenizers import Tokenizer as Backend

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = Backend.from_str(json.dumps(content))


def _lower_case(backend: Any) -> None:
    """Apply do_lower_case as sentence-transformers does: before the tokenizer's own normalisation, once."""
    from tokenizers.normalizers import Lowercase, Sequence

    own: Any = backend.normalizer
    several = isinstance(own, Sequence)
    steps = list(own) if several else [own] if own is not None else []
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])

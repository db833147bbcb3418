"""Query and passage to the flat token ids of one pair, for encoders (two sequences) and decoders (a prompt).

Only the passage is cut when a pair is too long; the query is cut when it alone takes more than its share. What a model's
template puts after the passage is never cut.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import ModelError
from .packing import offsets_of
from .spec import Tokens
from .tokenizer import Tokenizer

QUERY, PASSAGE = "{query}", "{passage}"


class Pairs(NamedTuple):
    """Pairs as token ids. second: int64 [n], tokens of a pair before its second segment (token type 1)."""

    tokens: Tokens
    second: np.ndarray


class PairFormat(Protocol):
    """How a model wants its pairs."""

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Pairs:
        """Tokenise pair i = (queries[i], passages[i])."""
        ...


class TwoSequences:
    """Encoders: the tokenizer's own special tokens around query and passage, as `tokenizer(query, passage)` puts them."""

    def __init__(self, tokenizer: Tokenizer, query_share: float) -> None:
        """query_share: of the model's length, what a query may take. Raises ModelError for a tokenizer without pairs, or a
        length that leaves no room for them."""
        self._tokenizer = tokenizer
        self._head, self._middle, self._tail, self._second = _around_pairs(tokenizer)
        self._room = tokenizer.max_tokens - len(self._head) - len(self._middle) - len(self._tail)
        if self._room < 2:
            raise ModelError(
                f"max_tokens={tokenizer.max_tokens} leaves {self._room} for query and passage. Ask for more."
            )
        self._most = min(max(1, int(tokenizer.max_tokens * query_share)), self._room - 1)

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Pairs:
        first = _each_once(self._tokenizer, queries)
        found: list[list[int]] = []
        truncated: list[bool] = []
        second: list[int] = []
        for query, passage in zip(first, self._tokenizer.contents(passages), strict=True):
            kept = query[: self._most]
            left = self._room - len(kept)
            found.append([*self._head, *kept, *self._middle, *passage[:left], *self._tail])
            truncated.append(len(query) > self._most or len(passage) > left)
            second.append(len(found[-1]) if self._second is None else len(self._head) + len(kept) + self._second)
        return _pairs(found, truncated, second)


class Prompt:
    """Decoders: segments of text, each tokenised on its own; special tokens are written out in them.

    A segment may hold {query}, and one of them ends with {passage}. Tokenising piece by piece is what the reference
    implementations do, and it keeps a cut passage from touching what follows.
    """

    def __init__(self, tokenizer: Tokenizer, segments: Sequence[str], limit: int, query_tokens: int) -> None:
        """limit: tokens of a pair. query_tokens: of a segment with the query, at most. Raises ModelError where the other
        segments leave no room for both."""
        self._tokenizer, self._segments, self._limit = tokenizer, tuple(segments), limit
        fixed = [text for text in segments if QUERY not in text and PASSAGE not in text]
        self._fixed = dict(zip(fixed, tokenizer.contents(fixed), strict=True))
        room = limit - sum(len(self._fixed[text]) for text in fixed)
        if room < 2:
            raise ModelError(
                f"{limit} tokens a pair leave {room} beside the prompt, for query and passage. Ask for more."
            )
        self._most = min(query_tokens, room - 1)

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Pairs:
        columns = [self._column(segment, queries, passages) for segment in self._segments]
        passage_at = next(i for i, segment in enumerate(self._segments) if segment.endswith(PASSAGE))
        found: list[list[int]] = []
        truncated: list[bool] = []
        for pieces in zip(*columns, strict=True):
            room = self._limit - sum(len(ids) for i, (ids, _) in enumerate(pieces) if i != passage_at)
            room = max(0, min(room, self._tokenizer.max_tokens))
            kept = [ids[:room] if i == passage_at else ids for i, (ids, _) in enumerate(pieces)]
            found.append(list(chain.from_iterable(kept)))
            truncated.append(any(cut for _, cut in pieces) or len(pieces[passage_at][0]) > room)
        return _pairs(found, truncated, [len(ids) for ids in found])

    def _column(self, segment: str, queries: Sequence[str], passages: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Ids of one segment in every pair, and whether its query was cut."""
        if segment in self._fixed:
            return [(self._fixed[segment], False)] * len(queries)
        if PASSAGE not in segment:
            ids = _each_once(self._tokenizer, [segment.replace(QUERY, query) for query in queries])
            return [(each[: self._most], len(each) > self._most) for each in ids]
        before, shortened = segment.removesuffix(PASSAGE), self._shorten(queries)
        texts = [before.replace(QUERY, query) + text for (query, _), text in zip(shortened, passages, strict=True)]
        return list(zip(self._tokenizer.contents(texts), [cut for _, cut in shortened], strict=True))

    def _shorten(self, queries: Sequence[str]) -> list[tuple[str, bool]]:
        """Queries within their share, each with whether it was cut: at the character where its last token ends."""
        known: dict[str, tuple[str, bool]] = {}
        for query in dict.fromkeys(queries):
            long = len(query.encode()) > self._most and len(spans := self._tokenizer.spans(query)) > self._most
            known[query] = (query[: int(spans[self._most - 1, 1])], True) if long else (query, False)
        return [known[query] for query in queries]


def _each_once(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts of which many are equal."""
    unique = list(dict.fromkeys(texts))
    known = dict(zip(unique, tokenizer.contents(unique), strict=True))
    return [known[text] for text in texts]


def _pairs(found: list[list[int]], truncated: list[bool], second: list[int]) -> Pairs:
    offsets = offsets_of(np.fromiter(map(len, found), np.int64, len(found)))
    ids = np.fromiter(chain.from_iterable(found), np.int32, int(offsets[-1]))
    return Pairs(Tokens(ids, offsets, np.array(truncated, dtype=bool)), np.array(second, dtype=np.int64))


def _around_pairs(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int], int | None]:
    """Special tokens before, between and after a pair, and how many of the middle ones have token type 0.

    None for a tokenizer that gives every token type 0.
    """
    left, right = tokenizer.contents(["a", "b"])
    whole = tokenizer.pair("a", "b")
    ids, kinds = whole["input_ids"], whole.get("token_type_ids") or [0] * len(whole["input_ids"])
    starts = [i for i in range(len(ids)) if ids[i : i + len(left)] == left]
    ends = [i for i in range(len(ids)) if ids[i : i + len(right)] == right]
    if not left or not right or len(starts) != 1 or len(ends) != 1 or kinds != sorted(kinds) or max(kinds) > 1:
        raise ModelError(f"The tokenizer joins pairs in a way that Shoal does not follow: {ids}, token types {kinds}.")
    after = starts[0] + len(left)
    border = kinds.index(1) - after if 1 in kinds else None
    return ids[: starts[0]], ids[after : ends[0]], ids[ends[0] + len(right) :], border

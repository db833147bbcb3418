"""Tokenise pairs of query and passage, for encoders (two sequences) and decoders (a prompt).

A pair that is too long loses the end of its passage. The query is cut only when it exceeds its own share of the length.
The part of a template after the passage is never cut.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ..errors import ModelError
from .packing import offsets_of
from .spec import Tokens
from .tokenizer import Tokenizer

QUERY, PASSAGE = "{query}", "{passage}"


class Pairs(NamedTuple):
    """Pairs as token ids. second: int64 [n], tokens of a pair before its second sequence (token type 1)."""

    tokens: Tokens
    second: np.ndarray


# The tokenising half of a reranker: pair i is (queries[i], passages[i]).
PairFormat = Callable[[Sequence[str], Sequence[str]], Pairs]


class TwoSequences:
    """The pair format of encoders: query and passage within the special tokens of `tokenizer(query, passage)`."""

    def __init__(self, tokenizer: Tokenizer, query_share: float, query_prompt: str = "") -> None:
        """Read the special tokens of a pair. query_share: the largest share of the model's length for a query, its prompt
        included.

        Raises ModelError for a tokenizer without pairs, or a length that leaves no room for them.
        """
        self._tokenizer, self._query_prompt = tokenizer, query_prompt
        self._head, self._middle, self._tail, self._second = _around_pairs(tokenizer)
        self._room = tokenizer.max_tokens - len(self._head) - len(self._middle) - len(self._tail)
        if self._room < 2:
            raise ModelError(
                f"max_tokens={tokenizer.max_tokens} leaves {self._room} for query and passage. Use a larger max_tokens."
            )
        self._query_limit = min(max(1, int(tokenizer.max_tokens * query_share)), self._room - 1)

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Pairs:
        tokenised_queries = _tokenise_unique(self._tokenizer, [self._query_prompt + query for query in queries])
        sequences: list[list[int]] = []
        truncated: list[bool] = []
        second: list[int] = []
        for query, passage in zip(tokenised_queries, self._tokenizer.contents(passages), strict=True):
            query_ids = query[: self._query_limit]
            passage_room = self._room - len(query_ids)
            before = [*self._head, *query_ids]
            sequences.append([*before, *self._middle, *passage[:passage_room], *self._tail])
            truncated.append(len(query) > self._query_limit or len(passage) > passage_room)
            second.append(len(sequences[-1]) if self._second is None else len(before) + self._second)
        return _pairs(sequences, truncated, second)


class Prompt:
    """The pair format of decoders: segments of text, each tokenised alone, with special tokens written out.

    A segment may contain {query}, and one of them ends with {passage}. The reference implementations tokenise by segment
    too, and a cut passage then cannot change the tokens after it.
    """

    def __init__(self, tokenizer: Tokenizer, segments: Sequence[str], limit: int, query_tokens: int) -> None:
        """Tokenise the fixed segments. limit: tokens of a pair. query_tokens: most tokens of a segment with the query.

        Raises ModelError where the fixed segments leave no room for query and passage.
        """
        self._tokenizer, self._segments, self._limit = tokenizer, tuple(segments), limit
        fixed = [text for text in segments if QUERY not in text and PASSAGE not in text]
        self._fixed = dict(zip(fixed, tokenizer.contents(fixed), strict=True))
        room = limit - sum(len(self._fixed[text]) for text in fixed)
        if room < 2:
            raise ModelError(
                f"{limit} tokens a pair leave {room} beside the prompt, for query and passage. Use a larger max_tokens."
            )
        self._query_limit = min(query_tokens, room - 1)

    def __call__(self, queries: Sequence[str], passages: Sequence[str]) -> Pairs:
        columns = [self._column(segment, queries, passages) for segment in self._segments]
        passage_at = next(i for i, segment in enumerate(self._segments) if segment.endswith(PASSAGE))
        sequences: list[list[int]] = []
        truncated: list[bool] = []
        for parts in zip(*columns, strict=True):
            room = self._limit - sum(len(ids) for i, (ids, _) in enumerate(parts) if i != passage_at)
            room = max(0, min(room, self._tokenizer.max_tokens))
            truncated_parts = (ids[:room] if i == passage_at else ids for i, (ids, _) in enumerate(parts))
            sequences.append(list(chain.from_iterable(truncated_parts)))
            truncated.append(any(cut for _, cut in parts) or len(parts[passage_at][0]) > room)
        return _pairs(sequences, truncated, [len(ids) for ids in sequences])

    def _column(self, segment: str, queries: Sequence[str], passages: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Return the ids of one segment in every pair, and whether its query was cut."""
        if segment in self._fixed:
            return [(self._fixed[segment], False)] * len(queries)
        if PASSAGE not in segment:
            ids = _tokenise_unique(self._tokenizer, [segment.replace(QUERY, query) for query in queries])
            return [(each[: self._query_limit], len(each) > self._query_limit) for each in ids]
        before, shortened = segment.removesuffix(PASSAGE), self._shorten(queries)
        texts = [before.replace(QUERY, query) + text for (query, _), text in zip(shortened, passages, strict=True)]
        return list(zip(self._tokenizer.contents(texts), [cut for _, cut in shortened], strict=True))

    def _shorten(self, queries: Sequence[str]) -> list[tuple[str, bool]]:
        """Cut queries to their share, at the character where the last token ends; return with each whether it was cut."""
        shortened: dict[str, tuple[str, bool]] = {}
        for query in dict.fromkeys(queries):
            long = (
                len(query.encode()) > self._query_limit
                and len(spans := self._tokenizer.spans(query)) > self._query_limit
            )
            shortened[query] = (query[: int(spans[self._query_limit - 1, 1])], True) if long else (query, False)
        return [shortened[query] for query in queries]


def _tokenise_unique(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts of which many are equal, each distinct text once."""
    unique = list(dict.fromkeys(texts))
    ids = dict(zip(unique, tokenizer.contents(unique), strict=True))
    return [ids[text] for text in texts]


def _pairs(sequences: list[list[int]], truncated: list[bool], second: list[int]) -> Pairs:
    """Lay the ids of the pairs end to end."""
    offsets = offsets_of(np.fromiter(map(len, sequences), np.int64, len(sequences)))
    ids = np.fromiter(chain.from_iterable(sequences), np.int32, int(offsets[-1]))
    return Pairs(Tokens(ids, offsets, np.array(truncated, dtype=bool)), np.array(second, dtype=np.int64))


def _around_pairs(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int], int | None]:
    """Return the special tokens before, between and after a pair, and how many of the middle ones have token type 0.

    The number is None for a tokenizer that gives every token type 0. Raises ModelError where the three cannot be told apart.
    """
    passage_room, right = tokenizer.contents(["a", "b"])
    whole = tokenizer.pair("a", "b")
    ids, kinds = whole["input_ids"], whole.get("token_type_ids") or [0] * len(whole["input_ids"])
    starts = [i for i in range(len(ids)) if ids[i : i + len(passage_room)] == passage_room]
    ends = [i for i in range(len(ids)) if ids[i : i + len(right)] == right]
    if not passage_room or not right or len(starts) != 1 or len(ends) != 1 or kinds != sorted(kinds) or max(kinds) > 1:
        raise ModelError(f"The tokenizer joins pairs in a way that Shoal does not follow: {ids}, token types {kinds}.")
    after = starts[0] + len(passage_room)
    border = kinds.index(1) - after if 1 in kinds else None
    return ids[: starts[0]], ids[after : ends[0]], ids[ends[0] + len(right) :], border

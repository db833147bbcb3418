"""Documents that begin alike, laid so that a shared beginning lies in the row once. Pure numpy.

The pairs of one query share the template and the query. Under a causal mask the states of that beginning do not depend
on what follows, so one copy serves all its passages: with N passages of D tokens after P shared ones, a row of P + N*D
tokens does the work of N * (P + D).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .packing import longest_first, offsets_of


class PackedRow(NamedTuple):
    """One packed batch: beginnings, each followed by what continues it, and whole documents.

    source: int64 [tokens], places in the flat ids. offsets: int64 [pieces + 1]. parents: int64 [pieces], the piece that
    comes before it, or -1. documents, ends: int64 [documents], which documents the row holds and where the last token of
    each lies in it.
    """

    source: np.ndarray
    offsets: np.ndarray
    parents: np.ndarray
    documents: np.ndarray
    ends: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Place of each token in its document, int64 [tokens]."""
        lengths = np.diff(self.offsets)
        before = np.where(self.parents < 0, 0, lengths[self.parents])
        return np.arange(len(self.source)) + np.repeat(before - self.offsets[:-1], lengths)


def shared_prefix_lengths(ids: np.ndarray, offsets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How many tokens each document shares with all of its group, int64 [n]; never its last one, 0 for a group of one.

    ids: [tokens]. offsets: int64 [n + 1]. groups: int64 [n], which documents are likely to begin alike.
    """
    shared = np.zeros(len(groups), dtype=np.int64)
    order = np.argsort(groups, kind="stable")
    borders = np.flatnonzero(np.diff(groups[order])) + 1
    for members in np.split(order, borders):
        if len(members) > 1:
            shared[members] = _common(ids, offsets[members], offsets[members + 1])
    return shared


def _common(ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> int:
    """Tokens at the head that all documents have in common, short of every document's last token."""
    length = max(0, int((ends - starts).min()) - 1)
    head = ids[starts[0] : starts[0] + length]
    for start in starts[1:]:
        different = np.flatnonzero(ids[start : start + length] != head[:length])
        if len(different):
            length = int(different[0])
    return length


def rows(
    offsets: np.ndarray, groups: np.ndarray, shared: np.ndarray, budget: int, documents: np.ndarray, one_group: bool
) -> Iterator[PackedRow]:
    """Each of `documents` in exactly one row of at most `budget` tokens, or of one document. Largest documents first.

    A group that exceeds the budget is cut, and its beginning laid once in each of its rows. one_group: whether a row
    must not hold several groups.
    """
    lengths = np.diff(offsets)
    pieces: list[np.ndarray] = []
    size = 0
    for members in _by_group(lengths, groups, documents):
        head = int(shared[members[0]])
        for part in _cut(members, lengths[members] - head, budget - head):
            cost = head + int((lengths[part] - head).sum())
            if pieces and (one_group or size + cost > budget):
                yield _lay(offsets, pieces, shared)
                pieces, size = [], 0
            pieces.append(part)
            size += cost
    if pieces:
        yield _lay(offsets, pieces, shared)


def _by_group(lengths: np.ndarray, groups: np.ndarray, documents: np.ndarray) -> list[np.ndarray]:
    """Documents of each group, longest first; the group with the longest document first. Empty ones are left out."""
    order = documents[longest_first(lengths[documents])][: np.count_nonzero(lengths[documents])]
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[inverse]
    order = order[np.argsort(rank, kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []


def _cut(members: np.ndarray, tails: np.ndarray, room: int) -> list[np.ndarray]:
    """Neighbouring members whose tails fit `room` together, one at least."""
    parts, start, used = [], 0, 0
    for place, tail in enumerate(tails.tolist()):
        if place > start and used + tail > room:
            parts.append(members[start:place])
            start, used = place, 0
        used += tail
    return [*parts, members[start:]]


def _lay(offsets: np.ndarray, parts: list[np.ndarray], shared: np.ndarray) -> PackedRow:
    starts: list[int] = []
    stops: list[int] = []
    parents: list[int] = []
    tails: list[int] = []  # the piece that ends each document
    for part in parts:
        # A beginning that one document alone would follow is not cut off: two pieces would cost more than one.
        head = int(shared[part[0]]) if len(part) > 1 else 0
        parent = -1
        if head:
            parent = len(starts)
            starts.append(int(offsets[part[0]]))
            stops.append(int(offsets[part[0]]) + head)
            parents.append(-1)
        for document in part:
            tails.append(len(starts))
            starts.append(int(offsets[document]) + head)
            stops.append(int(offsets[document + 1]))
            parents.append(parent)
    begin = np.array(starts, dtype=np.int64)
    laid = offsets_of(np.array(stops, dtype=np.int64) - begin)
    source = np.arange(laid[-1]) + np.repeat(begin - laid[:-1], np.diff(laid))
    return PackedRow(source, laid, np.array(parents, np.int64), np.concatenate(parts), laid[1:][tails] - 1)

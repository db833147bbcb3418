"""Prefix sharing: lay out documents that share a prefix so that the prefix is in the row once. Pure numpy.

The pairs of one query share the template and the query. Under a causal mask the states of this prefix do not depend on
the tokens after it, so one copy serves all passages: N passages of D tokens after P shared ones need a row of P + N*D
tokens in place of N * (P + D).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .packing import longest_first, offsets_of, places_of


class PackedRow(NamedTuple):
    """One packed batch of sequences: shared prefixes, each before the documents that continue it, and whole documents.

    source: int64 [tokens], positions in the flat ids. offsets: int64 [sequences + 1]. parents: int64 [sequences], the
    sequence that is the prefix of this one, or -1. documents, ends: int64 [documents], the documents of the row and the
    position of each one's last token in it.
    """

    source: np.ndarray
    offsets: np.ndarray
    parents: np.ndarray
    documents: np.ndarray
    ends: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """The position of each token in its document, int64 [tokens]."""
        lengths = np.diff(self.offsets)
        return places_of(np.where(self.parents < 0, 0, lengths[self.parents]), lengths)


def shared_prefix_lengths(ids: np.ndarray, offsets: np.ndarray, groups: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Count the tokens that each document shares with its whole group, int64 [n]: never the last one, 0 in a group of one.

    ids: [tokens]. offsets: int64 [n + 1]. groups: int64 [n], equal for documents that are likely to share a prefix.
    left_out: int64 [n], tokens at the end that do not count as the last one.
    """
    shared = np.zeros(len(groups), dtype=np.int64)
    order = np.argsort(groups, kind="stable")
    borders = np.flatnonzero(np.diff(groups[order])) + 1
    for members in np.split(order, borders):
        if len(members) > 1:
            shared[members] = _common_prefix(ids, offsets[members], offsets[members + 1] - left_out[members])
    return shared


def _common_prefix(ids: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> int:
    """Count the first tokens that all documents have in common, without any document's last token."""
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
    """Yield rows of at most `budget` tokens, or of one document, the longest documents first.

    Each of `documents` is in exactly one row. A group that exceeds the budget is cut, and its prefix is once in each of its
    rows. one_group: put the documents of one group only into a row.
    """
    lengths = np.diff(offsets)
    parts: list[np.ndarray] = []
    size = 0
    for members in _by_group(lengths, groups, documents):
        head = int(shared[members[0]])
        for part in _cut(members, lengths[members] - head, budget - head):
            cost = head + int((lengths[part] - head).sum())
            if parts and (one_group or size + cost > budget):
                yield _lay_out(offsets, parts, shared)
                parts, size = [], 0
            parts.append(part)
            size += cost
    if parts:
        yield _lay_out(offsets, parts, shared)


def _by_group(lengths: np.ndarray, groups: np.ndarray, documents: np.ndarray) -> list[np.ndarray]:
    """Split documents by group, longest first; the group with the longest document is first. Empty ones are left out."""
    order = documents[longest_first(lengths[documents])][: np.count_nonzero(lengths[documents])]
    _, first, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[inverse]
    order = order[np.argsort(rank, kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []


def _cut(members: np.ndarray, lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Cut members into runs whose lengths fit into `room` together, of one member at least."""
    parts, start, used = [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        if place > start and used + length > room:
            parts.append(members[start:place])
            start, used = place, 0
        used += length
    return [*parts, members[start:]]


def _lay_out(offsets: np.ndarray, parts: list[np.ndarray], shared: np.ndarray) -> PackedRow:
    """Lay out one row: each part is documents of one group, after their shared prefix."""
    sequences: list[tuple[int, int, int]] = []  # start, end and parent
    last_sequences: list[int] = []  # the sequence that ends each document
    for part in parts:
        # A prefix of one document alone is not cut off: two sequences would cost more than one.
        head = int(shared[part[0]]) if len(part) > 1 else 0
        parent = len(sequences) if head else -1
        if head:
            sequences.append((offsets[part[0]], offsets[part[0]] + head, -1))
        for document in part:
            last_sequences.append(len(sequences))
            sequences.append((offsets[document] + head, offsets[document + 1], parent))
    starts, ends, parents = np.array(sequences, dtype=np.int64).T
    row_offsets = offsets_of(ends - starts)
    last_tokens = row_offsets[1:][last_sequences] - 1
    return PackedRow(places_of(starts, ends - starts), row_offsets, parents, np.concatenate(parts), last_tokens)

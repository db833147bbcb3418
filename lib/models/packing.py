"""Packing by token budget: choose the documents of each batch, and lay their tokens end to end. Pure numpy.

A packed batch has documents one after the other with no padding. Its attention cost grows with the square of each
document's length and every other cost with the number of tokens, so a batch is limited by tokens, never by documents.
Documents of one length lie side by side: such a group is a plain dense tensor and needs neither mask nor padding.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """A run of documents of one length: tokens `start` to `start + count * length` of the batch.

    prefix: start and length of the tokens that each document attends to before its own; (0, 0) for none.
    """

    start: int
    count: int
    length: int
    prefix: tuple[int, int] = (0, 0)


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Sort document indices, int64 [n], from the longest to the shortest; equal lengths keep their order.

    A budget that is too large for the memory then fails in the first batch and not in the last.
    """
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


def next_cut(offsets: np.ndarray, start: int, budget: int) -> int:
    """Return the end (exclusive) of the batch that starts at document `start`: all whole documents within `budget` tokens.

    offsets: int64 [n + 1], start of each document. A document longer than the budget is a batch of its own.
    """
    end = int(np.searchsorted(offsets, offsets[start] + budget, side="right")) - 1
    return min(max(end, start + 1), len(offsets) - 1)


def plan_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut document indices into batches, longest first, each of at most `budget` tokens or of one document.

    lengths: tokens of each document, int [n]. Every index is in exactly one batch; the same input gives the same plan.
    """
    order = longest_first(lengths)
    offsets = offsets_of(np.asarray(lengths)[order])
    batches, start = [], 0
    while start < len(order):
        end = next_cut(offsets, start, budget)
        batches.append(order[start:end])
        start = end
    return batches


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return the start of each document and the end of the last one: int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def places_of(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
    """Concatenate ranges: for each i the numbers starts[i], starts[i] + 1, ..., lengths[i] of them. int64 [sum(lengths)]."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def positions_of(offsets: np.ndarray) -> np.ndarray:
    """Return the position of each token in its document, from 0: int64 [tokens]."""
    return places_of(0, np.diff(offsets))


def gather(ids: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay the documents `order` end to end: ids [their tokens], offsets int64 [len(order) + 1]."""
    lengths = np.diff(offsets)[order]
    return ids[places_of(np.asarray(offsets)[order], lengths)], offsets_of(lengths)


def length_groups(offsets: np.ndarray, parents: np.ndarray | None = None) -> list[Group]:
    """Group neighbouring documents of one length, in order; documents without tokens are left out.

    parents: int64 [n], for each document the index of the one that is its prefix, or -1. A group has one parent.
    """
    lengths = np.diff(offsets)
    if len(lengths) == 0:
        return []
    parents = np.full(len(lengths), -1) if parents is None else parents
    changes = (lengths[1:] != lengths[:-1]) | (parents[1:] != parents[:-1])
    first = np.flatnonzero(np.concatenate(([True], changes)))
    counts = np.diff(np.append(first, len(lengths)))
    starts = offsets[:-1] - offsets[0]
    prefixes = [np.where(parents < 0, 0, of_documents[parents])[first] for of_documents in (starts, lengths)]
    runs = np.stack([starts[first], counts, lengths[first], *prefixes], axis=1).tolist()
    return [Group(start, count, length, (*prefix,)) for start, count, length, *prefix in runs if length]


def padded_tokens(lengths: np.ndarray, batch_size: int = 32) -> int:
    """Return the tokens, padding included, that batches of `batch_size` documents in their order would have."""
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(np.asarray(lengths, dtype=np.int64), starts) if len(lengths) else starts
    return int((longest * np.diff(np.append(starts, len(lengths)))).sum())

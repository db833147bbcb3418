"""Token budgets: which documents share a batch, and how their tokens lie end to end. Pure numpy.

A packed batch holds documents one after the other with no padding. Its attention cost grows with the square of each
document's length and everything else with the number of tokens, so batches are cut by tokens, never by documents.
Documents of one length lie together: such a run is a plain dense tensor and needs neither mask nor padding.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """A run of documents of one length: tokens `start` to `start + count * length` of the batch.

    prefix: start and length of tokens of the batch that each of them also sees, before its own; (0, 0) for none.
    """

    start: int
    count: int
    length: int
    prefix: tuple[int, int] = (0, 0)


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Document indices, int64 [n], from the longest to the shortest; equal lengths keep their order.

    Longest first, so that a budget too large for the memory shows in the first batch and not in the last.
    """
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


def next_cut(offsets: np.ndarray, start: int, budget: int) -> int:
    """End (exclusive) of the batch that begins at document `start`: as many whole documents as `budget` tokens hold.

    offsets: int64 [n + 1], where each document begins. A document longer than the budget is a batch of its own.
    """
    end = int(np.searchsorted(offsets, offsets[start] + budget, side="right")) - 1
    return min(max(end, start + 1), len(offsets) - 1)


def plan_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Batches of document indices, longest documents first, each of at most `budget` tokens or of one document.

    lengths: tokens a document, int [n]. Every index is in exactly one batch; the same input gives the same plan.
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
    """Where each document begins and the last one ends: int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def positions_of(offsets: np.ndarray) -> np.ndarray:
    """Place of each token in its document, from 0: int64 [tokens]."""
    return np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], np.diff(offsets))


def gather(ids: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents `order` laid end to end: (ids [tokens of those], offsets int64 [len(order) + 1])."""
    starts = np.asarray(offsets)[order]
    packed = offsets_of(np.asarray(offsets)[order + 1] - starts)
    source = np.arange(packed[-1]) + np.repeat(starts - packed[:-1], np.diff(packed))
    return ids[source], packed


def length_groups(offsets: np.ndarray, parents: np.ndarray | None = None) -> list[Group]:
    """Runs of neighbouring documents of one length, in order; documents without tokens are left out.

    parents: int64 [n], for each document the place of the one that is its prefix, or -1. A run has one parent.
    """
    lengths = np.diff(offsets)
    if len(lengths) == 0:
        return []
    parents = np.full(len(lengths), -1) if parents is None else parents
    differs = (lengths[1:] != lengths[:-1]) | (parents[1:] != parents[:-1])
    first = np.flatnonzero(np.concatenate(([True], differs)))
    counts = np.diff(np.append(first, len(lengths)))
    starts = offsets - offsets[0]

    def prefix(parent: int) -> tuple[int, int]:
        return (0, 0) if parent < 0 else (int(starts[parent]), int(lengths[parent]))

    runs = zip(starts[first], counts, lengths[first], parents[first], strict=True)
    return [Group(int(s), int(n), int(length), prefix(int(parent))) for s, n, length, parent in runs if length]


def padding_waste(lengths: np.ndarray, batch_size: int = 32) -> float:
    """Share of the tokens that would be padding in batches of `batch_size` documents in arrival order, 0 to 1."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.sum() == 0:
        return 0.0
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths, starts)
    padded = (longest * np.diff(np.append(starts, len(lengths)))).sum()
    return 1.0 - float(lengths.sum() / padded)

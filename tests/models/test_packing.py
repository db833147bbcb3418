"""Packing: plans by token budget, gathering, and groups of one length."""

import itertools

import numpy as np
import pytest

from lib.models.packing import (
    Group,
    gather,
    length_groups,
    longest_first,
    offsets_of,
    padded_tokens,
    places_of,
    plan_batches,
    positions_of,
)


def random_lengths(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 60, size=int(rng.integers(0, 200)))


@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_in_exactly_one_batch(seed: int) -> None:
    """A plan is a permutation of the documents, whatever the lengths and the budget."""
    lengths = random_lengths(seed)
    batches = plan_batches(lengths, budget=1 + seed * 7)

    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_is_within_the_budget_or_one_document(seed: int) -> None:
    """No batch is empty, one above the budget has a single document, and none has room for the next document."""
    lengths, budget = random_lengths(seed), 1 + seed * 7
    batches = plan_batches(lengths, budget)

    assert all(len(batch) >= 1 for batch in batches)
    assert all(len(batch) == 1 or lengths[batch].sum() <= budget for batch in batches)
    pairs = itertools.pairwise(batches)
    assert all(lengths[left].sum() + lengths[right[0]] > budget for left, right in pairs)


def test_longest_first_and_ties_in_arrival_order() -> None:
    """Lengths never increase, and documents of one length keep their order."""
    assert longest_first(np.array([3, 5, 3, 5, 0])).tolist() == [1, 3, 0, 2, 4]


def test_the_same_lengths_give_the_same_plan() -> None:
    """A plan depends on nothing but the lengths and the budget."""
    lengths = random_lengths(3)

    assert [b.tolist() for b in plan_batches(lengths, 50)] == [b.tolist() for b in plan_batches(lengths.copy(), 50)]


@pytest.mark.parametrize("seed", range(5))
def test_gather_lays_the_chosen_documents_end_to_end(seed: int) -> None:
    """gather equals cutting each document out and concatenating."""
    lengths = random_lengths(seed)
    offsets = offsets_of(lengths)
    ids = np.arange(offsets[-1], dtype=np.int32) + 7
    order = longest_first(lengths)[::2]
    flat, packed = gather(ids, offsets, order)

    expected = [ids[offsets[i] : offsets[i + 1]] for i in order]
    assert flat.tolist() == [int(token) for document in expected for token in document]
    assert np.diff(packed).tolist() == [len(document) for document in expected]


def test_positions_restart_in_every_document() -> None:
    """Positions count from 0 in each document, also for a slice of offsets that begins elsewhere; places from each run's start."""
    assert positions_of(np.array([4, 7, 7, 9])).tolist() == [0, 1, 2, 0, 1]
    assert places_of(np.array([7, 5, 1]), np.array([3, 0, 2])).tolist() == [7, 8, 9, 1, 2]


def test_groups_cover_the_tokens_in_runs_of_one_length() -> None:
    """Neighbours of one length form one group; documents without tokens are in none."""
    offsets = offsets_of(np.array([4, 4, 3, 1, 1, 1, 0, 0]))

    assert length_groups(offsets) == [Group(0, 2, 4), Group(8, 1, 3), Group(11, 3, 1)]
    assert length_groups(np.zeros(1, dtype=np.int64)) == []


def test_padded_tokens_are_those_of_batches_in_arrival_order() -> None:
    """Two batches of two: 8 + 2 and 1 + 1 tokens are padded to 8 and 1 each."""
    assert padded_tokens(np.array([8, 2, 1, 1]), batch_size=2) == 18
    assert padded_tokens(np.array([], dtype=np.int64)) == 0

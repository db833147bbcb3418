"""Prefix sharing: rows contain every token of every document."""

import numpy as np

from lib.models import prefix_sharing


def test_every_document_is_in_one_row() -> None:
    """For any groups, prefixes and budgets a row has every token of its documents, in order and at its position."""
    random = np.random.default_rng(0)
    for budget in (1, 20, 60, 10_000):
        groups = random.integers(0, 6, 40)
        prefixes = [random.integers(0, 50, size) for size in (0, 1, 5, 9, 3, 7)]
        texts = [np.concatenate([prefixes[g], random.integers(50, 99, random.integers(1, 9))]) for g in groups]
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
        ids = np.concatenate(texts)
        shared = prefix_sharing.shared_prefix_lengths(ids, offsets, groups, np.zeros(len(groups), np.int64))
        documents: list[int] = []
        for row in prefix_sharing.rows(offsets, groups, shared, budget, np.arange(40), False):
            assert len(row.source) <= budget or len(row.documents) == 1
            for document, end in zip(row.documents, row.ends, strict=True):
                sequence = int(np.searchsorted(row.offsets, end, side="right")) - 1
                sequences = [sequence] if row.parents[sequence] < 0 else [int(row.parents[sequence]), sequence]
                places = np.concatenate([np.arange(row.offsets[p], row.offsets[p + 1]) for p in sequences])
                assert ids[row.source[places]].tolist() == texts[document].tolist()
                assert row.positions[places].tolist() == list(range(len(texts[document])))
            documents += row.documents.tolist()
        assert sorted(documents) == list(range(40))

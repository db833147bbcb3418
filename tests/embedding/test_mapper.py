"""Stored vectors of the embed job, of each output dtype, without a model."""

import numpy as np
import pytest

from lib.embedding.mapper import NOT_FINITE, stored_vectors

LARGE = "a number of the vector is too large for float16"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "ubinary"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 7e4, -65_520.0, 65_504.0])
def test_a_vector_that_cannot_be_stored_has_a_reason(dtype, bad):
    """A vector that is not finite, before the cast or after it, is replaced by a reason; the vectors beside it stay the same."""
    vectors = np.full((3, 8), 0.5, np.float32)
    vectors[1, 3] = bad
    ranges = np.array([[-1] * 8, [1] * 8], np.float32)
    stored, reasons = stored_vectors(vectors, dtype, ranges)
    alone, _ = stored_vectors(vectors[:1], dtype, ranges)
    expected = NOT_FINITE if not np.isfinite(bad) else LARGE if dtype == "float16" and abs(bad) > 65_504 else None

    assert reasons.to_pylist() == [None, expected, None]
    assert (stored[[0, 2]] == alone).all()
    assert np.isfinite(stored).all()

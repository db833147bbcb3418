"""Columns of vectors as matrices, whatever Arrow type holds them."""

import numpy as np
import pyarrow as pa
import pytest

from lib.data.vectors import as_matrix

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)


def list_column(vectors):
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


@pytest.mark.parametrize("type", [np.float32, np.float16, np.int8, np.uint8])
def test_a_column_of_lists_keeps_its_type(type):
    column = list_column(VECTORS.astype(type))
    assert as_matrix(column).dtype == type
    np.testing.assert_array_equal(as_matrix(column), VECTORS)
    assert as_matrix(column, np.float32).dtype == np.float32


def test_slices_chunks_and_filtered_rows():
    """Rows are those of the column, not of the buffers beneath it."""
    column = list_column(VECTORS)
    np.testing.assert_array_equal(as_matrix(column[1:3]), VECTORS[1:3])
    np.testing.assert_array_equal(as_matrix(pa.chunked_array([column[2:], column[:1]])), VECTORS[[2, 3, 0]])
    some = pa.FixedSizeListArray.from_arrays(
        pa.array(VECTORS.reshape(-1)), 3, mask=pa.array([False, True, False, False])
    )
    np.testing.assert_array_equal(as_matrix(some.filter(some.is_valid())), VECTORS[[0, 2, 3]])
    with pytest.raises(AssertionError, match="without a vector"):
        as_matrix(some)


def test_binary_values_are_seen_as_numbers():
    data = pa.Array.from_buffers(pa.binary(12), 4, [None, pa.py_buffer(VECTORS)])
    np.testing.assert_array_equal(as_matrix(data, np.float32), VECTORS)
    np.testing.assert_array_equal(as_matrix(data[1:3], np.float32), VECTORS[1:3])
    assert as_matrix(data, np.uint8).shape == (4, 12)


def test_nothing_has_no_rows():
    assert as_matrix(list_column(VECTORS)[:0]).shape == (0, 3)
    assert as_matrix(pa.chunked_array([], pa.list_(pa.float32(), 3))).shape == (0, 3)
    assert as_matrix(pa.chunked_array([], pa.binary(12)), np.float32).shape == (0, 3)


def test_one_chunk_is_not_copied():
    column = pa.chunked_array([list_column(VECTORS)])
    assert np.shares_memory(as_matrix(column), as_matrix(column))

"""Vectors as Arrow columns: float32, float16, int8 by ranges shared by a whole run, ubinary."""

from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike

from .reader import as_one_array

OutputDtype = Literal["float32", "float16", "int8", "ubinary"]


def quantise(vectors: np.ndarray, dtype: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Convert float32 [n, dim] to `dtype` [n, dim], or for ubinary to uint8 [n, dim / 8], the sign bits, first one highest.

    int8 cuts `ranges` (float32 [2, dim]: least and greatest) into 256 steps, -128 the lowest, as
    sentence-transformers' quantize_embeddings does; a value outside of them gets the first or the last step.
    """
    if dtype == "int8":
        assert ranges is not None
        steps = (ranges[1] - ranges[0]) / 255
        places = np.floor((vectors - ranges[0]) / np.where(steps == 0, 1, steps))
        return (np.clip(places, 0, 255) - 128).astype(np.int8)
    if dtype == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    return vectors.astype(dtype)


def row_bytes(dim: int, dtype: str) -> int:
    """Bytes of a row of the column."""
    return dim // 8 if dtype == "ubinary" else dim * {"float32": 4, "float16": 2, "int8": 1}[dtype]


def to_column(vectors: np.ndarray, index: pa.Array) -> pa.FixedSizeListArray:
    """Make a column whose row i is `vectors[index[i]]` (vectors: [n, width], index: int32, null for a row without a vector)."""
    width = vectors.shape[1]
    absent = index.is_null().to_numpy(zero_copy_only=False)
    places = index.fill_null(0).to_numpy(zero_copy_only=False)
    picked = vectors[places] if len(vectors) else np.zeros((len(index), width), vectors.dtype)
    picked[absent] = 0
    mask = pa.array(absent) if index.null_count else None
    return pa.FixedSizeListArray.from_arrays(pa.array(picked.reshape(-1)), width, mask=mask)


def as_matrix(column: pa.ChunkedArray | pa.Array, dtype: DTypeLike | None = None) -> np.ndarray:
    """[n, width]: the vectors of a column without nulls; not copied where they lie together and have the type already.

    dtype: of the result; None keeps that of the column's numbers. A column of fixed-size binary values, which has none of
    its own, is seen as numbers of this type.
    """
    array = as_one_array(column)
    assert not array.null_count, "a row without a vector"
    if pa.types.is_fixed_size_binary(array.type):
        assert dtype is not None, "binary values have no type of their own"
        size = array.type.byte_width
        data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * size : (array.offset + len(array)) * size]
        return data.reshape(-1, size).view(dtype)
    numbers = array.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(array), array.type.list_size).astype(dtype or numbers.dtype, copy=False)

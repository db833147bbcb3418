"""Ids that must name one row each."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from ..errors import InputError

NAMED = 3  # ids that are named; all are counted


def check_unique_ids(pieces: Callable[[], Iterable[pa.Array]], what: str, where: str) -> None:
    """Raises InputError for ids that come more than once. pieces: reads them anew, some at a time, none of them null.

    Memory: 8 bytes an id, and those that come more than once.
    """
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *map(_hashed, pieces())]), return_counts=True)
    suspected = values[counts > 1]
    if not len(suspected):
        return
    named = (ids.filter(pa.array(np.isin(_hashed(ids), suspected))) for ids in pieces())
    twice = [each for each in Counter(name for ids in named for name in ids.to_pylist()).items() if each[1] > 1]
    if twice:
        said = ", ".join(f"{name!r} ({count} times)" for name, count in twice[:NAMED])
        raise InputError(
            f"{len(twice):,} {what} ids come more than once in {where}: {said}. An id must name one {what}"
        )


def _hashed(ids: pa.Array) -> np.ndarray:
    """uint64 [n]"""
    from pandas.util import hash_array

    return hash_array(ids.to_numpy(zero_copy_only=False).astype(object), categorize=False)

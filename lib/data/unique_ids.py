"""A check that every id names one row."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from ..errors import InputError

MAX_NAMED = 3  # repeated ids named in the error; all are counted


def check_unique_ids(read: Callable[[], Iterable[pa.Array]], what: str, where: str) -> None:
    """Raise InputError for repeated ids. read: reads the ids, some at a time, none of them null; it is called twice.

    Memory: 8 bytes an id, and the repeated ids.
    """
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *map(_hashed, read())]), return_counts=True)
    repeated = values[counts > 1]  # hashes: two different ids may share one
    if not len(repeated):
        return
    candidates = (ids.filter(pa.array(np.isin(_hashed(ids), repeated))) for ids in read())
    twice = [each for each in Counter(name for ids in candidates for name in ids.to_pylist()).items() if each[1] > 1]
    if twice:
        examples = ", ".join(f"{name!r} ({count} times)" for name, count in twice[:MAX_NAMED])
        raise InputError(
            f"{len(twice):,} {what} ids come more than once in {where}: {examples}. An id must name one {what}"
        )


def _hashed(ids: pa.Array) -> np.ndarray:
    """The hash of each id, uint64 [n]."""
    from pandas.util import hash_array

    return hash_array(ids.to_numpy(zero_copy_only=False).astype(object), categorize=False)

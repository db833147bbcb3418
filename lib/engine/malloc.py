"""The C library's heap in processes that compute on CPUs. Other C libraries than glibc have no such call, and need none."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers of them
APART = 1 << 20  # bytes
KEPT, MOST_KEPT = 32 << 20, 256 << 20  # bytes of a block, the most that glibc takes, and in all


def return_large_blocks() -> None:
    """From here on glibc gives blocks of 1 MiB and more pages of their own, which go back when the block is freed.

    By itself it moves that size up to 32 MiB, and the tensors of chunks that are all of another length tear the heap into
    holes: 1,588 MiB instead of 1,384 for 2,048 pairs of MiniLM, and growing with the batch. Pages that are always new cost
    time (`LOG.md`).
    """
    _set(M_MMAP_THRESHOLD, APART)


def keep_large_blocks() -> None:
    """From here on glibc gives blocks of up to 32 MiB from what was freed before, and gives nothing of that back until it is 256 MiB.

    By itself it returns the pages of a large array to the kernel, which clears new ones for the next: time for nothing where arrays
    are of a few sizes, a tenth of what encoding vectors for an index takes.
    """
    _set(M_MMAP_THRESHOLD, KEPT)
    _set(M_TRIM_THRESHOLD, MOST_KEPT)


def _set(option: int, bytes: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, bytes)

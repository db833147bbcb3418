"""Settings of glibc's malloc in processes that compute on CPUs. Other C libraries have no such call, and need none."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameter numbers of mallopt
MAPPED_BYTES = 1 << 20  # blocks of at least this size get pages of their own
REUSED_BYTES = 32 << 20  # of a block; the greatest M_MMAP_THRESHOLD that glibc accepts
UNUSED_BYTES = 256 << 20  # free memory that the process keeps


def return_large_blocks() -> None:
    """Give blocks of 1 MiB and more pages of their own, which return to the kernel when the block is freed."""
    # By default glibc raises that size to 32 MiB, and tensors of chunks that all differ in length fragment its heap.
    _set(M_MMAP_THRESHOLD, MAPPED_BYTES)


def keep_large_blocks() -> None:
    """Reuse freed memory for blocks of up to 32 MiB, and return none of it to the kernel while it is less than 256 MiB."""
    # By default glibc returns a large array's pages to the kernel, which clears new ones for the next array of the same size.
    _set(M_MMAP_THRESHOLD, REUSED_BYTES)
    _set(M_TRIM_THRESHOLD, UNUSED_BYTES)


def _set(option: int, bytes: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, bytes)

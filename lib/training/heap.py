"""The C library's heap while a model is trained on CPUs."""

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD, APART = -3, 1 << 20  # mallopt's number of it; bytes


def great_blocks_apart() -> None:
    """From here on glibc gives blocks of 1 MiB and more pages of their own, which go back when the block is freed.

    By itself it moves that size up to 32 MiB, and the tensors of chunks that are all of another length tear the heap into
    holes: 1,588 MiB instead of 1,384 for 2,048 pairs of MiniLM, and growing with the batch. Pages that are always new cost
    time (`LOG.md`). Other C libraries have no such call, and need none.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, APART)

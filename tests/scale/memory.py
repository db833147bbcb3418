"""What all processes of a test take together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def memory_watched() -> Iterator[list[int]]:
    """Bytes of this process and all below it, twice a second, the first before anything was done; shared pages are counted
    once."""
    seen, over = [_bytes()], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            seen.append(_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(timeout=30)


def _bytes() -> int:
    total = 0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total

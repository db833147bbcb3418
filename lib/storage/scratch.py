"""Temporary local folders that do not stay for good after a killed process: the next process that makes one removes them."""

import fcntl
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "shoal-"
LOCK = "in-use"  # file in a folder, locked as long as the process of the folder lives


class Scratch(tempfile.TemporaryDirectory):
    """A temporary folder with a lock that ends with the process, however it ends. Folders whose lock is free are removed first."""

    def __init__(self, purpose: str) -> None:
        _clear()
        super().__init__(prefix=f"{PREFIX}{purpose}-", ignore_cleanup_errors=True)
        unlocked = Path(self.name) / f"{LOCK}.new"
        self._lock = unlocked.open("wb")  # locked as long as it is open
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(Path(self.name) / LOCK)


def _clear() -> None:
    """Remove the folders of killed processes, whose locks are free."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open("rb") as file:  # locked, another user's, or removed by now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)

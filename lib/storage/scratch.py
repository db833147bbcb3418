"""Temporary folders of this machine that a killed process does not leave behind for good: the next one to need some clears up."""

import fcntl
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

PREFIX, LOCK = "shoal-", "in-use"


class Scratch(tempfile.TemporaryDirectory):
    """A temporary folder, held by a lock that ends with the process, however it ends. Folders that nobody holds are removed."""

    def __init__(self, purpose: str) -> None:
        _clear()
        super().__init__(prefix=f"{PREFIX}{purpose}-", ignore_cleanup_errors=True)
        self._held = _hold(Path(self.name))


def _hold(folder: Path) -> IO[bytes]:
    """Lock the folder for as long as the file is open. It has the lock's name only once it is locked."""
    held = (folder / f"{LOCK}.new").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    (folder / f"{LOCK}.new").rename(folder / LOCK)
    return held


def _clear() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open("rb") as file:  # held, somebody else's, or gone by now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)

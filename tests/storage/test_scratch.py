"""Temporary folders: removed after their use, and after the death of their process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib.storage.scratch import Scratch

HOLDER = """
import time
from lib.storage.scratch import Scratch
scratch = Scratch("test")
print(scratch.name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def holder() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_folder_is_removed_by_the_next(temporary):
    """A folder stays as long as its process lives, also while others are made; after a kill the next process removes it."""
    process = holder()
    try:
        folder = Path(process.stdout.readline().strip())
        (folder / "file").write_bytes(b"much")
        with Scratch("other") as place:
            assert folder.exists()
            assert Path(place).parent == folder.parent == temporary
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert folder.exists()
    with Scratch("other"):
        assert not folder.exists()
    assert list(temporary.iterdir()) == []


def test_folders_of_others_stay(temporary):
    """A folder without our lock file is not ours: it is not removed."""
    (temporary / "shoal-cache").mkdir()
    with Scratch("test"):
        pass
    assert [path.name for path in temporary.iterdir()] == ["shoal-cache"]

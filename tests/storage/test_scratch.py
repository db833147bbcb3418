"""lib/storage/scratch.py: temporary folders that outlive neither their use nor a killed process for long."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib.storage.scratch import Scratch

HOLDER = "from lib.storage.scratch import Scratch; import time; held = Scratch('test'); print(held.name, flush=True); time.sleep(60)"


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def holder() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_folder_is_removed_by_the_next(temporary):
    """A folder stays as long as its process lives, whoever makes others; once that was killed the next one removes it."""
    process = holder()
    try:
        folder = Path(process.stdout.readline().strip())
        (folder / "piece").write_bytes(b"much")
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
    """What has no lock of ours is nobody's business: it is left alone."""
    (temporary / "shoal-cache").mkdir()
    with Scratch("test"):
        pass
    assert [path.name for path in temporary.iterdir()] == ["shoal-cache"]

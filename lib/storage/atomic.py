"""Writes of whole objects in one step: a listed name is a complete object, on the local filesystem and on object stores.

Locally the bytes go to a hidden file beside the name. It is synced, and takes the name by a rename (`put`) or by a link, which
unlike a rename refuses an existing name (`create`). An object store does both itself. Nothing here retries.
"""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import StorageError
from .retry import error_code

STALE_SECONDS = 600.0  # age of an unfinished local file without a writer: writing a part takes a few seconds


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the filesystem is that of this machine."""
    return isinstance(fs, LocalFileSystem)


def put(fs: fsspec.AbstractFileSystem, path: str, data: bytes | memoryview) -> None:
    """Write `data` under `path`, over an existing object. Raises what the filesystem raises."""
    if is_local(fs):
        _take_name(path, lambda: _write_unfinished(path, data))
    else:
        fs.pipe_file(path, bytes(data))


def put_file(fs: fsspec.AbstractFileSystem, path: str, source: str) -> None:
    """Write the local file `source` under `path`, over an existing object. Raises what the filesystem raises.

    On one disk both names are then one file: the source must not be written to again.
    """
    if is_local(fs):
        _take_name(path, lambda: _link_unfinished(path, source))
    else:
        fs.put_file(source, path)


def create(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write `data` under `path`, which must not exist yet. Raises FileExistsError when it does."""
    if not is_local(fs):
        try:
            fs.pipe_file(path, data, mode="create")
        except Exception as error:
            if error_code(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(path) from error
            raise
        return
    unfinished = _write_unfinished(path, data)
    try:
        os.link(unfinished, path)
        _sync_folder(path)
    except FileNotFoundError as error:  # swept by another driver, which has published the name
        raise FileExistsError(path) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def make_folder(path: str) -> None:
    """Make a local folder, and a trial file in it. Raises StorageError where that is not possible."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=path, prefix=".", suffix=".unfinished").close()  # of a killed driver: swept
    except OSError as error:
        raise StorageError(
            f"cannot write to {path}: {error.strerror}. Choose a folder that you may write to"
        ) from error


def sweep(path: str, done: Container[str]) -> None:
    """Remove unfinished files of killed writers from a local folder: those of names in `done`, and those over STALE_SECONDS old."""
    for entry in os.scandir(path):
        with suppress(FileNotFoundError):  # another driver has removed or published it
            name, _, end = entry.name.removeprefix(".").rpartition(".")
            if end == "unfinished" and (
                name.rpartition(".")[0] in done or time.time() - entry.stat().st_mtime > STALE_SECONDS
            ):
                os.unlink(entry.path)


def _take_name(path: str, write: Callable[[], str]) -> None:
    """Give an unfinished file its name. Write it once more where another driver has published the name and swept the file."""
    try:
        os.replace(write(), path)
    except FileNotFoundError:
        os.replace(write(), path)
    _sync_folder(path)


@contextmanager
def _unfinished(path: str) -> Iterator[str]:
    """A hidden name beside `path`, in the same folder, which is made. On an error, as on a full disk, the file is removed."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}.unfinished"
    try:
        yield unfinished
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def _write_unfinished(path: str, data: bytes | memoryview) -> str:
    with _unfinished(path) as unfinished, open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return unfinished


def _link_unfinished(path: str, source: str) -> str:
    """Make an unfinished file of the bytes of `source`: a link, or a copy where it lies on another disk."""
    with _unfinished(path) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
    return unfinished


def _sync_folder(path: str) -> None:
    """Sync the folder: after a power cut the new name could be missing otherwise, though the file would be complete."""
    handle = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

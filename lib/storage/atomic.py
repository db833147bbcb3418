"""Whole objects in one step: what is listed under a name is all of it, on the local filesystem and on object stores.

Locally the bytes go to a hidden file beside the name, are synced, and take the name by a rename (`put`) or a link, which
unlike a rename refuses an existing name (`create`). An object store does both itself. Nothing here tries again.
"""

import os
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress

import fsspec

from ..errors import StorageError
from .retry import error_code

STALE = 600.0  # seconds after which an unfinished local file has no writer any more; a part takes some


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The names under which fsspec knows the filesystem, as `s3` and `s3a`."""
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in protocols(fs)


def put(fs: fsspec.AbstractFileSystem, path: str, data: bytes | memoryview) -> None:
    """`data` under `path`, over what was there. Raises what the filesystem raises."""
    if not is_local(fs):
        fs.pipe_file(path, bytes(data))
        return
    _take_name(path, lambda: _write_unfinished(path, [data]))


def put_file(fs: fsspec.AbstractFileSystem, path: str, source: str) -> None:
    """The file `source` of this machine under `path`, over what was there, however large. Raises what the filesystem raises.

    On one disk they are one file from then on: the source must not be written to again.
    """
    if not is_local(fs):
        fs.put_file(source, path)
        return
    _take_name(path, lambda: _link_unfinished(path, source))


def create(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """`data` under `path`, which must be free. Raises FileExistsError when it is not."""
    if not is_local(fs):
        return _create_object(fs, path, data)
    unfinished = _write_unfinished(path, [data])
    try:
        os.link(unfinished, path)
        _sync_folder(path)
    except FileNotFoundError as error:  # swept by one that had published the name
        raise FileExistsError(path) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def make_folder(path: str) -> None:
    """A local folder that can be written to. Raises StorageError."""
    try:
        os.makedirs(path, exist_ok=True)
        trial = f"{path}/.{uuid.uuid4().hex}.unfinished"
        with open(trial, "wb"):
            pass
        os.unlink(trial)
    except OSError as error:
        raise StorageError(
            f"cannot write to {path}: {error.strerror}. Choose a folder that you may write to"
        ) from error


def sweep(path: str, done: Container[str]) -> None:
    """Remove what killed writers left in a local folder: of names in `done`, and where no writer can still be at it."""
    for entry in os.scandir(path):
        with suppress(FileNotFoundError):  # another driver sweeps too, or has just published it
            name, _, end = entry.name.removeprefix(".").rpartition(".")
            if end == "unfinished" and (name.rpartition(".")[0] in done or time.time() - entry.stat().st_mtime > STALE):
                os.unlink(entry.path)


def _create_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if error_code(error) in ("PreconditionFailed", "412"):
            raise FileExistsError(path) from error
        raise


def _link_unfinished(path: str, source: str) -> str:
    """The bytes of `source`, copied where they lie on another disk."""
    unfinished = _unfinished(path)
    try:
        os.link(source, unfinished)
    except OSError:  # another disk, or one without links
        with open(source, "rb") as file:
            return _write_unfinished(path, iter(lambda: file.read(8 << 20), b""))
    with _whole_or_gone(unfinished), open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    return unfinished


@contextmanager
def _whole_or_gone(unfinished: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def _take_name(path: str, write: Callable[[], str]) -> None:
    """Give an unfinished file its name. It is written once more where another driver, having published the same, has swept it."""
    try:
        os.replace(write(), path)
    except FileNotFoundError:
        os.replace(write(), path)
    _sync_folder(path)


def _unfinished(path: str) -> str:
    """A hidden name beside it, in a folder that is there."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    return f"{folder}/.{name}.{uuid.uuid4().hex}.unfinished"


def _write_unfinished(path: str, pieces: Iterable[bytes | memoryview]) -> str:
    unfinished = _unfinished(path)
    with _whole_or_gone(unfinished), open(unfinished, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    return unfinished


def _sync_folder(path: str) -> None:
    """Without it a power cut may forget the rename, though not tear the file."""
    handle = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

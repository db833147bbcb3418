"""Objects at any fsspec URL: open, list, publish atomically, claim once.

Two guarantees hold on the local filesystem and on object stores alike. A listed name is a complete object: `publish` puts it
in one step. A claimed name keeps the bytes of one process: `claim` creates and never overwrites. Transient errors (503, reset,
timeout, a server that restarts) are retried for RETRY_SECONDS; permanent ones (no bucket, no credentials, a full disk) are a
`StorageError` at once.
"""

import hashlib
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

import fsspec

from ..errors import StorageError
from . import atomic
from .filesystem import PROBE_OPTIONS, filesystem, has_buckets, open_file
from .retry import PROBE_SECONDS, final_reason, retrying


@dataclass(frozen=True)
class Folder:
    """A folder of objects, addressed by their bare names. Small and picklable: it travels to every worker."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return filesystem(self.url, self.options)

    def path(self, name: str) -> str:
        """The URL of an object in the folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def below(self, name: str) -> "Folder":
        """A folder in this one."""
        return replace(self, url=self.path(name))

    def probe(self) -> None:
        """Check once that the store exists and admits us. Raises StorageError within seconds."""
        fs, path = self._open()
        if atomic.is_local(fs):
            atomic.make_folder(path)
        elif has_buckets(fs):
            if hasattr(fs, "call_s3"):
                fs, path = filesystem(self.url, PROBE_OPTIONS | self.options)
            try:
                retrying(lambda: _list_one(fs, path.split("/")[0]), self.url, PROBE_SECONDS)
            except FileNotFoundError as error:
                raise StorageError(f"{self.url}: no such bucket. Create it, or correct the URL") from error

    def list(self, prefix: str = "") -> dict[str, int]:
        """Names directly in the folder that start with `prefix`, with their sizes in bytes; nothing unfinished."""
        fs, path = self._open()

        def names() -> dict[str, int]:
            try:
                entries = fs.ls(path, detail=True)
            except FileNotFoundError as error:
                if final_reason(error):  # the bucket, not the folder, is missing
                    raise
                return {}
            files = ((e["name"].rsplit("/", 1)[-1], e) for e in entries if e["type"] == "file")
            shown = ((name, e) for name, e in files if name and not name.startswith("."))  # a folder marker has no name
            return {name: e["size"] for name, e in shown if name.startswith(prefix)}

        return retrying(names, self.url)

    def exists(self, name: str) -> bool:
        """Whether the object exists: one request, while `list` makes one for every thousand names."""
        fs, path = self._open()
        try:
            retrying(lambda: fs.info(f"{path}/{name}"), self.path(name))
        except FileNotFoundError:
            return False
        return True

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on the disk of the calling node."""
        return atomic.is_local(self._open()[0])

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none."""
        fs, path = self._open()
        return retrying(lambda: fs.cat_file(f"{path}/{name}"), self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader that fetches ranges. Raises FileNotFoundError when there is no such object."""
        return open_file(self.path(name), self.options)

    def publish(self, name: str, data: bytes | memoryview) -> None:
        """Put the whole object under `name` in one step, over an existing one. Raises StorageError."""
        fs, path = self._open()
        retrying(lambda: atomic.put(fs, f"{path}/{name}", data), self.path(name))

    def put(self, name: str, path: str) -> str:
        """Put a local file of any size under `name` in one step; returns its sha256. The file must not be written to again.

        Raises StorageError.
        """
        fs, place = self._open()
        retrying(lambda: atomic.put_file(fs, f"{place}/{name}", path), self.path(name))
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def claim(self, name: str, data: bytes) -> bool:
        """Create `name` unless it exists; true when what is stored now is `data`.

        A retried request whose first answer was lost meets its own object, hence the comparison. Stores without an atomic
        create (OpenStack Swift) may let a later process win: claim bytes that every process writes alike, or read them back.
        """
        fs, path = self._open()

        def attempt() -> None:
            with suppress(FileExistsError):
                atomic.create(fs, f"{path}/{name}", data)

        retrying(attempt, self.path(name))
        return self.read(name) == data

    def remove(self, name: str) -> None:
        """Delete an object, if it exists."""
        fs, path = self._open()

        def attempt() -> None:
            with suppress(FileNotFoundError):
                fs.rm_file(f"{path}/{name}")

        retrying(attempt, self.path(name))

    def remove_all(self) -> None:
        """Delete every object below the folder."""
        fs, path = self._open()

        def attempt() -> None:
            with suppress(FileNotFoundError):
                fs.rm(path, recursive=True)

        retrying(attempt, self.url)

    def sweep(self, done: Container[str]) -> None:
        """Remove unfinished local files of killed writers: those of names in `done`, which are published, and old ones."""
        fs, path = self._open()
        if atomic.is_local(fs):
            atomic.sweep(path, done)


def _list_one(fs: fsspec.AbstractFileSystem, bucket: str) -> None:
    """Make the cheapest request that needs the bucket and the right to list it."""
    if hasattr(fs, "call_s3"):
        fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    else:
        fs.ls(bucket)

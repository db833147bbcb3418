"""Objects at any fsspec URL: open, list, publish atomically, claim once.

Two guarantees hold on the local filesystem and on object stores alike. A listed name is a complete object: `publish` puts it
in one step. A claimed name keeps the bytes of one process: `claim` creates and never overwrites. Transient errors (503, reset,
timeout, a server that restarts) are retried for RETRY_SECONDS; permanent ones (no bucket, no credentials, a full disk) are a
`StorageError` at once.
"""

import hashlib
import json
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import IO, Any, TypeVar

import fsspec

from ..errors import StorageError
from . import atomic
from .filesystem import PROBE_OPTIONS, filesystem, has_bucket, open_file
from .retry import PROBE_SECONDS, retrying

T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """A folder of objects, addressed by their names. Small and picklable: it travels to every worker."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

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
        elif has_bucket(self.url):
            bucket = path.split("/")[0]
            request = partial(fs.ls, bucket)
            if hasattr(fs, "call_s3"):  # the cheapest request that needs the bucket and the right to list it
                quick, _ = filesystem(self.url, PROBE_OPTIONS | self.options)
                request = partial(quick.call_s3, "list_objects_v2", Bucket=bucket, MaxKeys=1)
            try:
                retrying(request, self.url, PROBE_SECONDS)
            except FileNotFoundError as error:
                raise StorageError(f"{self.url}: no such bucket. Create it, or correct the URL") from error

    def list(self, prefix: str = "") -> dict[str, int]:
        """Names directly in the folder that start with `prefix`, with their sizes in bytes; nothing unfinished."""
        try:
            entries = self._retry(lambda fs, path: fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        files = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries if entry["type"] == "file"}
        hidden = ("", ".")  # a folder marker has no name
        return {name: size for name, size in files.items() if name[:1] not in hidden and name.startswith(prefix)}

    def exists(self, name: str) -> bool:
        """Whether the object exists: one request, while `list` makes one for every thousand names."""
        try:
            self._retry(lambda fs, path: fs.info(path), name)
        except FileNotFoundError:
            return False
        return True

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on the disk of the calling node."""
        return atomic.is_local(self._open()[0])

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none."""
        return self._retry(lambda fs, path: fs.cat_file(path), name)

    def read_json(self, name: str) -> Any:
        """The JSON of an object; None when there is none."""
        with suppress(FileNotFoundError):
            return json.loads(self.read(name))
        return None

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader that fetches ranges. Raises FileNotFoundError when there is no such object."""
        return open_file(self.path(name), self.options)

    def publish(self, name: str, data: bytes | memoryview) -> None:
        """Put the whole object under `name` in one step, over an existing one. Raises StorageError."""
        self._retry(lambda fs, path: atomic.put(fs, path, data), name)

    def put(self, name: str, source: str) -> str:
        """Put a local file of any size under `name` in one step; returns its sha256. It must not be written to again."""
        self._retry(lambda fs, path: atomic.put_file(fs, path, source), name)
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def claim(self, name: str, data: bytes) -> bool:
        """Create `name` unless it exists; true when what is stored now is `data`.

        A retried request whose first answer was lost meets its own object, hence the comparison. Stores without an atomic
        create (OpenStack Swift) may let a later process win: claim bytes that every process writes alike, or read them back.
        """

        def create(fs: fsspec.AbstractFileSystem, path: str) -> None:
            with suppress(FileExistsError):
                atomic.create(fs, path, data)

        self._retry(create, name)
        return self.read(name) == data

    def remove(self, name: str) -> None:
        """Delete an object, if it exists."""
        with suppress(FileNotFoundError):
            self._retry(lambda fs, path: fs.rm_file(path), name)

    def remove_all(self) -> None:
        """Delete every object below the folder."""
        with suppress(FileNotFoundError):
            self._retry(lambda fs, path: fs.rm(path, recursive=True))

    def sweep(self, done: Container[str]) -> None:
        """Remove unfinished local files of killed writers: those of names in `done`, which are published, and old ones."""
        fs, path = self._open()
        if atomic.is_local(fs):
            atomic.sweep(path, done)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return filesystem(self.url, self.options)

    def _retry(self, request: Callable[[fsspec.AbstractFileSystem, str], T], name: str = "") -> T:
        """The answer to a request about an object, or about the folder itself."""
        fs, path = self._open()
        place, url = (f"{path}/{name}", self.path(name)) if name else (path, self.url)
        return retrying(lambda: request(fs, place), url)

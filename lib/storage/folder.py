"""Objects at any fsspec URL: open, list, publish atomically, claim once.

Two promises hold on the local filesystem and on object stores alike. A name that is listed holds a whole object:
`publish` puts it in one step. A name that was claimed keeps the bytes of one racer: `claim` creates, never overwrites.
What may pass (503, reset, timeout, a server that restarts) is tried again for `PATIENCE` seconds; what will not pass
(no bucket, no credentials, a full disk) is a `StorageError` at once.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from ..errors import StorageError, UsageError
from . import atomic
from .retry import PROBE_SECONDS, final_reason, retrying

BUCKETS = frozenset({"s3", "s3a", "gs", "gcs"})
# Ceph before 17, rclone and others answer 411 to the checksummed uploads that AWS clients send by default.
CHECKSUM_ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
# One layer retries, this module: botocore's own attempts on top would multiply into a storm.
PROBE_OPTIONS = {
    "config_kwargs": {"connect_timeout": 3, "read_timeout": PROBE_SECONDS, "retries": {"total_max_attempts": 1}}
}
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"total_max_attempts": 1}}}


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as fsspec options; true, false, {...} and [...] are read as JSON. Raises UsageError."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--storage-option {pair!r} is not KEY=VALUE, as in endpoint_url=http://host:9000")
        try:
            options[key] = json.loads(value) if value in ("true", "false") or value[:1] in ("{", "[") else value
        except ValueError as error:
            raise UsageError(f"--storage-option {pair!r}: the value begins as JSON and is none ({error})") from error
    return options


def filesystem(url: str, options: Mapping[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem and the path within it. Raises UsageError for an unknown or uninstalled scheme."""
    for name, value in CHECKSUM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    scheme = url.split("://")[0] if "://" in url else "file"
    defaults: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        defaults |= S3_OPTIONS
    try:
        fs, path = url_to_fs(url, **(defaults | dict(options)))
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"cannot open {url!r}: {error}. Known at hand: a local path, s3://, gs:// (extra 'gs')"
        ) from error
    if hasattr(fs, "call_s3"):
        fs.retries = 1  # as S3_OPTIONS: retrying is done here
    return fs, path.rstrip("/") or "/"


def absolute(url: str) -> str:
    """The URL with a local path made absolute: processes of a cluster have other current folders."""
    return url if "://" in url else os.path.abspath(url)


def has_buckets(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether the first name of a path is a bucket, which can be asked for."""
    return not BUCKETS.isdisjoint(atomic.protocols(fs))


@dataclass(frozen=True)
class Folder:
    """A folder of objects, addressed by their bare names. Small and picklable: it travels to every worker."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return filesystem(self.url, self.options)

    def path(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def below(self, name: str) -> "Folder":
        """A folder in this one."""
        return replace(self, url=self.path(name))

    def probe(self) -> None:
        """Ask once whether the store is there and lets us in. Raises StorageError within seconds."""
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
            found = ((e["name"].rsplit("/", 1)[-1], e) for e in entries if e["type"] == "file")
            shown = ((name, e) for name, e in found if name and not name.startswith("."))  # a folder marker has no name
            return {name: e["size"] for name, e in shown if name.startswith(prefix)}

        return retrying(names, self.url)

    def exists(self, name: str) -> bool:
        """Whether there is such an object: one request, where `list` makes one for every thousand names."""
        fs, path = self._open()
        try:
            retrying(lambda: fs.info(f"{path}/{name}"), self.path(name))
        except FileNotFoundError:
            return False
        return True

    @property
    def is_local(self) -> bool:
        """Whether it lies on the disk of the node that asks."""
        return atomic.is_local(self._open()[0])

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none."""
        fs, path = self._open()
        return retrying(lambda: fs.cat_file(f"{path}/{name}"), self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader that fetches ranges. Raises FileNotFoundError when there is no such object."""
        return open_file(self.path(name), self.options)

    def publish(self, name: str, data: bytes | memoryview) -> None:
        """Put the whole object under `name` in one step, over what was there. Raises StorageError."""
        fs, path = self._open()
        retrying(lambda: atomic.put(fs, f"{path}/{name}", data), self.path(name))

    def put(self, name: str, path: str) -> str:
        """Put a file of this machine, which must not be written to again, under `name` in one step, however large; its sha256.
        Raises StorageError."""
        fs, place = self._open()
        retrying(lambda: atomic.put_file(fs, f"{place}/{name}", path), self.path(name))
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def claim(self, name: str, data: bytes) -> bool:
        """Create `name` unless it exists; true when what is stored now is `data`.

        A retried request whose first answer was lost finds its own object, hence the comparison. Stores without an
        atomic create (OpenStack Swift) may let a later racer win: claim only what every racer writes alike, or read back.
        """
        fs, path = self._open()

        def attempt() -> None:
            with suppress(FileExistsError):
                atomic.create(fs, f"{path}/{name}", data)

        retrying(attempt, self.path(name))
        return self.read(name) == data

    def remove(self, name: str) -> None:
        """Delete an object; nothing to do when it is not there."""
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
        """Remove what killed writers left of unfinished local files: of names in `done`, which are published, and of
        others once no living writer can still be at them."""
        fs, path = self._open()
        if atomic.is_local(fs):
            atomic.sweep(path, done)


def open_file(url: str, options: Mapping[str, Any], buffering: int = 8 << 20) -> IO[bytes]:
    """A seekable reader over `url` that fetches `buffering` bytes at a time."""
    fs, path = filesystem(url, options)
    if atomic.is_local(fs):
        return open(path, "rb")
    size = retrying(lambda: fs.info(path), url)["size"]
    return io.BufferedReader(_Ranges(fs, path, url, size), buffering)


def download(url: str, path: str, options: Mapping[str, Any]) -> str:
    """A file of this machine that holds the object: `path`, or the object itself where it lies here."""
    fs, place = filesystem(url, options)
    if atomic.is_local(fs):
        return place
    with open_file(url, options) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, 8 << 20)
    return path


class _Ranges(io.RawIOBase):
    """An object read by ranges, each tried again while the store is away."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, url: str, size: int):
        self.fs, self.path, self.url, self.size, self.position = fs, path, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readall(self) -> bytes:
        rest = bytearray(max(0, self.size - self.position))
        view = memoryview(rest)
        while view:
            view = view[self.readinto(view[: 8 << 20]) :]
        return bytes(rest)

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        data = retrying(lambda: self.fs.cat_file(self.path, start=self.position, end=end), self.url)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _list_one(fs: fsspec.AbstractFileSystem, bucket: str) -> None:
    """The cheapest question that needs the bucket and the right to list it."""
    if hasattr(fs, "call_s3"):
        fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    else:
        fs.ls(bucket)

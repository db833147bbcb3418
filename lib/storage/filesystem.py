"""The fsspec filesystem of a URL, with options that suit this project, and readers of objects by ranges."""

import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from ..cli.options import option
from ..errors import UsageError
from . import atomic
from .retry import PROBE_SECONDS, retrying

BUCKETS = frozenset({"s3", "s3a", "gs", "gcs"})  # schemes of object stores, whose URLs begin with a bucket
# Ceph before 17, rclone and others answer 411 to the checksummed uploads that AWS clients send by default.
CHECKSUM_ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
# Only retry.py retries: botocore's own attempts on top would multiply the requests to a store in trouble.
PROBE_OPTIONS = {
    "config_kwargs": {"connect_timeout": 3, "read_timeout": PROBE_SECONDS, "retries": {"total_max_attempts": 1}}
}
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"total_max_attempts": 1}}}
CHAIN = re.compile(r"::\w+://")  # of fsspec: one filesystem within another
READ_BYTES = 8 << 20  # of one request: so large that its latency is a small part of its time


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """Access to the stores of input and output."""

    storage_option: tuple[str, ...] = option(
        "fsspec option for input and output, as endpoint_url=http://host:9000. Repeat it for more.", (), many=True
    )

    @property
    def fsspec(self) -> dict[str, Any]:
        """The options for fsspec. Raises UsageError for a word that is not KEY=VALUE."""
        return parse_options(self.storage_option)


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` words as fsspec options; true, false, {...} and [...] are read as JSON. Raises UsageError."""
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
        fs, path = _open(url, scheme, defaults | dict(options))
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"cannot open {url!r}: {error}. Known at hand: a local path, s3://, gs:// (extra 'gs')"
        ) from error
    if hasattr(fs, "call_s3"):
        fs.retries = 1  # as S3_OPTIONS: only retry.py retries
    return fs, path.rstrip("/") or "/"


def _open(url: str, scheme: str, options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's `url_to_fs`, for which `::` in a name is no chain of filesystems: only `zip://a::s3://b` and the like are."""
    if CHAIN.search(url):
        return url_to_fs(url, **options)
    options |= options.pop(scheme, {})  # fsspec takes options by protocol too
    kind = fsspec.get_filesystem_class(scheme)
    return kind(**(kind._get_kwargs_from_urls(url) | options)), kind._strip_protocol(url)


def absolute(url: str) -> str:
    """The URL with a local path made absolute: processes of a cluster have other current folders."""
    return url if "://" in url else os.path.abspath(url)


def has_bucket(url: str) -> bool:
    """Whether the first name of the path is a bucket, which can be probed."""
    return url.split("://")[0] in BUCKETS


def open_file(url: str, options: Mapping[str, Any], buffering: int = READ_BYTES) -> IO[bytes]:
    """Open `url` as a seekable reader that fetches `buffering` bytes at a time."""
    fs, path = filesystem(url, options)
    if atomic.is_local(fs):
        return open(path, "rb")
    size = retrying(lambda: fs.info(path), url)["size"]
    return io.BufferedReader(_Ranges(fs, path, url, size), buffering)


def download(url: str, path: str, options: Mapping[str, Any]) -> str:
    """Download the object to the local file `path`. Returns the file to read: `path`, or the object itself where it is local."""
    fs, place = filesystem(url, options)
    if atomic.is_local(fs):
        return place
    with open_file(url, options) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file, READ_BYTES)
    return path


class _Ranges(io.RawIOBase):
    """A reader of an object by ranges, each retried while the store is away."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, url: str, size: int):
        self.fs, self.path, self.url, self.size, self.position = fs, path, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def readall(self) -> bytes:
        rest = bytearray(max(0, self.size - self.position))
        view = memoryview(rest)
        while view:
            view = view[self.readinto(view[:READ_BYTES]) :]
        return bytes(rest)

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        data = retrying(lambda: self.fs.cat_file(self.path, start=self.position, end=end), self.url)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

"""Objects at any fsspec URL: find, open, list, publish atomically, claim once.

Two promises hold on the local filesystem and on object stores alike. A name that is listed holds a whole object:
`publish` puts it in one step. A name that was claimed keeps the bytes of one racer: `claim` creates, never overwrites.
What may pass (503, reset, timeout, a server that restarts) is tried again for `PATIENCE` seconds; what will not pass
(no bucket, no credentials, a full disk) is a `StorageError` at once.
"""

import errno
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from .errors import StorageError, UsageError

PATIENCE = 120.0  # seconds; a store that restarts is back in 1 to 20
PROBE_PATIENCE = 4.0  # seconds; a wrong endpoint is told to a waiting person
HIDDEN = (".", "_")  # first letters of names that are not part of a corpus

# Ceph before 17, rclone and others answer 411 to the checksummed uploads that AWS clients send by default.
CHECKSUM_ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
# One layer retries, this module: botocore's own attempts on top would multiply into a storm.
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"total_max_attempts": 1}}}

T = TypeVar("T")


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus as it was listed: `size` in bytes, `tag` its etag or modification time."""

    path: str
    size: int
    tag: str


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as fsspec options; a value that is JSON is read as such. Raises UsageError."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--storage-option {pair!r} is not KEY=VALUE, as in endpoint_url=http://host:9000")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
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
    return fs, path.rstrip("/") or "/"


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


@dataclass(frozen=True)
class Folder:
    """A folder of objects, addressed by their bare names. Small and picklable: it travels to every worker."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    def _open(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return filesystem(self.url, self.options)

    def path(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def probe(self) -> None:
        """Ask once whether the store is there and lets us in. Raises StorageError within seconds."""
        fs, path = self._open()
        if is_local(fs):
            return _local_folder(path)
        bucket = path.split("/")[0]
        _retrying(lambda: _list_one(fs, bucket), self.url, PROBE_PATIENCE)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Names directly in the folder that start with `prefix`, with their sizes in bytes; nothing unfinished."""
        fs, path = self._open()

        def names() -> dict[str, int]:
            try:
                entries = fs.ls(path, detail=True)
            except FileNotFoundError as error:
                if _final_reason(error):  # the bucket, not the folder, is missing
                    raise
                return {}
            found = ((e["name"].rsplit("/", 1)[-1], e) for e in entries if e["type"] == "file")
            shown = ((name, e) for name, e in found if name and not name.startswith("."))  # a folder marker has no name
            return {name: e["size"] for name, e in shown if name.startswith(prefix)}

        return _retrying(names, self.url)

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError when there is none."""
        fs, path = self._open()
        return _retrying(lambda: fs.cat_file(f"{path}/{name}"), self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader that fetches ranges. Raises FileNotFoundError when there is no such object."""
        return open_file(self.path(name), self.options)

    def publish(self, name: str, data: bytes | memoryview) -> None:
        """Put the whole object under `name` in one step, over what was there. Raises StorageError."""
        fs, path = self._open()
        put = _put_local if is_local(fs) else _put_object
        _retrying(lambda: put(fs, f"{path}/{name}", data), self.path(name))

    def claim(self, name: str, data: bytes) -> bool:
        """Create `name` unless it exists; true when what is stored now is `data`.

        A retried request whose first answer was lost finds its own object, hence the comparison. Stores without an
        atomic create (OpenStack Swift) may let a later racer win: claim only what every racer writes alike, or read back.
        """
        fs, path = self._open()
        create = _create_local if is_local(fs) else _create_object

        def attempt() -> bool:
            with suppress(FileExistsError):
                create(fs, f"{path}/{name}", data)
            return fs.cat_file(f"{path}/{name}") == data

        return _retrying(attempt, self.path(name))

    def sweep(self) -> None:
        """Remove what killed writers left of unfinished local files. Call it when nothing is written any more."""
        fs, path = self._open()
        if is_local(fs):
            for name in os.listdir(path):
                if name.startswith(".") and name.endswith(".unfinished"):
                    os.unlink(f"{path}/{name}")


def find(url: str, options: Mapping[str, Any]) -> list[InputFile]:
    """Every file under a file, folder or glob, sorted by path; hidden names (`_x`, `.x`) below it are left out.

    Raises StorageError when the store cannot be asked; an empty list means that nothing is there.
    """
    fs, path = filesystem(url, options)

    def listing() -> dict[str, dict[str, Any]]:
        if _is_glob(path):
            return fs.glob(path, detail=True)
        try:
            return fs.find(path, detail=True)
        except FileNotFoundError as error:
            if "bucket" in str(error).lower():
                raise
            return {}

    entries = _retrying(listing, url, PROBE_PATIENCE)
    if not entries and not is_local(fs):
        Folder(url, dict(options)).probe()
    files = [InputFile(fs.unstrip_protocol(p), e["size"], _tag(e)) for p, e in entries.items() if _is_file(p, e)]
    root = fs.unstrip_protocol(re.split(r"[*?\[]", path)[0].rpartition("/")[0] if _is_glob(path) else path)
    return sorted((f for f in files if not _hidden(f.path, root)), key=lambda file: file.path)


def open_file(url: str, options: Mapping[str, Any], buffering: int = 8 << 20) -> IO[bytes]:
    """A seekable reader over `url` that fetches `buffering` bytes at a time."""
    fs, path = filesystem(url, options)
    if is_local(fs):
        return open(path, "rb")
    opened = _retrying(lambda: fs.open(path, "rb", block_size=buffering, cache_type="readahead"), url)
    return opened


def current_tag(url: str, options: Mapping[str, Any]) -> tuple[int, str]:
    """Size and tag of the file as it is now, to hold against the plan."""
    fs, path = filesystem(url, options)
    entry = _retrying(lambda: fs.info(path), url)
    return entry["size"], _tag(entry)


def _tag(entry: Mapping[str, Any]) -> str:
    for key in ("ETag", "etag", "mtime", "LastModified", "updated", "last_modified"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    return ""


def _is_file(path: str, entry: Mapping[str, Any]) -> bool:
    """Not a folder, nor the empty object ending in `/` by which consoles mark one."""
    return entry["type"] == "file" and not path.endswith("/")


def _is_glob(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(HIDDEN) for part in path.removeprefix(root).split("/") if part)


def _local_folder(path: str) -> None:
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


def _list_one(fs: fsspec.AbstractFileSystem, bucket: str) -> None:
    """The cheapest question that needs the bucket and the right to list it."""
    if hasattr(fs, "call_s3"):
        fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
    else:
        fs.ls(bucket)


def _write_unfinished(path: str, data: bytes | memoryview) -> str:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    return unfinished


def _sync_folder(path: str) -> None:
    """Without it a power cut may forget the rename, though not tear the file."""
    handle = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_local(fs: fsspec.AbstractFileSystem, path: str, data: bytes | memoryview) -> None:
    os.replace(_write_unfinished(path, data), path)
    _sync_folder(path)


def _create_local(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    unfinished = _write_unfinished(path, data)
    try:
        os.link(unfinished, path)  # link, unlike rename, refuses an existing name
        _sync_folder(path)
    finally:
        os.unlink(unfinished)


def _put_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes | memoryview) -> None:
    fs.pipe_file(path, bytes(data))


def _create_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    try:
        fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if "PreconditionFailed" in repr(error) or "412" in repr(error) or _code(error) == "PreconditionFailed":
            raise FileExistsError(path) from error
        raise


def _retrying(attempt: Callable[[], T], url: str, patience: float = PATIENCE) -> T:
    """Run `attempt` until it succeeds, fails for good, or `patience` seconds are over."""
    deadline = time.monotonic() + patience
    pause = 0.2
    while True:
        try:
            return attempt()
        except (TypeError, AttributeError, LookupError, AssertionError):
            raise  # a mistake of ours, not the store's
        except Exception as error:
            final = _final_reason(error)
            if isinstance(error, FileNotFoundError) and not final:
                raise
            if final or time.monotonic() + pause > deadline:
                raise StorageError(f"{url}: {final or _passing_reason(error, patience)}") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 8.0)


def _code(error: BaseException) -> str:
    """The store's own error code, from botocore's exception or the one s3fs made of it."""
    for e in (error, error.__cause__):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _final_reason(error: Exception) -> str | None:
    """Why trying again is useless, with what to do; None when it may pass or is the caller's to judge."""
    code, text = _code(error), f"{type(error).__name__}: {error}"
    if "NoCredentials" in text or "Unable to locate credentials" in text or "PartialCredentials" in text:
        return "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or --storage-option anon=true"
    if code == "NoSuchBucket" or "bucket does not exist" in text:
        return "no such bucket. Create it, or correct the URL; AWS_ENDPOINT_URL says which server is asked"
    if isinstance(error, PermissionError) or code in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied"):
        return f"access denied ({code or error}). Check the access key, the secret and the bucket's policy"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free space and start the same command again: it goes on where it stopped"
    if isinstance(error, (IsADirectoryError, NotADirectoryError, ValueError)):
        return text
    return None


def _passing_reason(error: Exception, patience: float) -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    asked = f" at {endpoint}" if endpoint else ""
    return (
        f"the store{asked} did not answer within {patience:.0f} s ({type(error).__name__}: {error}). "
        "Check the endpoint and the network, then start the same command again"
    )

"""The files under a URL: a file, a folder or a glob. A place that cannot be listed is an error, never left out."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.utils import glob_translate

from ..errors import StorageError, UsageError
from . import atomic
from .filesystem import filesystem, has_bucket
from .folder import Folder
from .retry import retrying

HIDDEN = (".", "_")  # first letters of names that are not part of a corpus
WILDCARDS = "*?["


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus as it was listed. name: its path below the input; size: bytes; tag: its etag or modification time."""

    path: str
    name: str
    size: int
    tag: str


def find(url: str, options: Mapping[str, Any]) -> list[InputFile]:
    """List every file under a file, folder or glob, sorted by path; hidden names (`_x`, `.x`) below it are left out.

    What exists under the very name comes before what it matches as a pattern. A folder that a glob matches stands for all its
    files. Raises StorageError, and UsageError for an invalid pattern.
    """
    fs, path = filesystem(url, options)
    if has_bucket(url):
        Folder(url, dict(options)).probe()
    scope, files = _Scope(path, literal=True), []
    entries = retrying(lambda: _entries(fs, scope), url)
    if not entries and any(letter in path for letter in WILDCARDS):  # a name comes before a pattern
        scope = _Scope(path)
        entries = retrying(lambda: _entries(fs, scope), url)
    for place, entry in entries.items():
        # Consoles make an empty object that ends in `/` for a folder.
        if entry["type"] == "file" and not place.endswith("/") and scope.contains(place):
            files.append(InputFile(fs.unstrip_protocol(place), scope.name(place), entry["size"], _tag(entry)))
    return sorted(files, key=lambda file: file.path)


def covers(url: str, folder: str, options: Mapping[str, Any]) -> bool:
    """Whether `find` of `url` would list a file in `folder`."""
    (fs, path), (other, place) = filesystem(url, options), filesystem(folder, options)
    part = f"{place.rstrip('/')}/part.parquet"
    scopes = _Scope(path, literal=True), _Scope(path)
    return fs.protocol == other.protocol and any(scope.contains(part) for scope in scopes)


def current_tag(url: str, options: Mapping[str, Any]) -> tuple[int, str]:
    """Size and tag of the file now, to compare with the plan. Raises FileNotFoundError."""
    fs, path = filesystem(url, options)
    entry = _local_entry(path) if atomic.is_local(fs) else retrying(lambda: fs.info(path), url)
    return entry["size"], _tag(entry)


class _Scope:
    """The places that a path or a pattern matches. root: the folder, or file, above every one of them. literal: a path it is."""

    def __init__(self, path: str, literal: bool = False) -> None:
        self.path = path
        self.pattern: re.Pattern[str] | None = None
        self.root, self.prefix = path, ""
        if not literal and any(letter in path for letter in WILDCARDS):
            fixed = re.split(r"[*?\[]", path)[0]
            self.root, _, self.prefix = fixed.rpartition("/")
            try:
                self.pattern = re.compile(glob_translate(path))
            except ValueError as error:
                raise UsageError(f"{path!r} is not a pattern: {error}") from error

    def name(self, place: str) -> str:
        """The path of a place below the root; its last name where it is the root itself."""
        return place.removeprefix(self.root).strip("/") or place.rpartition("/")[2]

    def contains(self, place: str) -> bool:
        """Whether the path or pattern matches a file at this place, or a folder above it."""
        below = place == self.root or place.startswith(f"{self.root.rstrip('/')}/")
        if not below or any(part.startswith(HIDDEN) for part in self.name(place).split("/")):
            return False
        while self.pattern and len(place) > len(self.root):
            if self.pattern.match(place):
                return True
            place = place.rpartition("/")[0]
        return self.pattern is None


def _entries(fs: fsspec.AbstractFileSystem, scope: _Scope) -> dict[str, dict[str, Any]]:
    """Every entry below the scope's root. A filesystem's own glob may silently omit some on an error."""
    if atomic.is_local(fs):
        return {place: _local_entry(place) for place in _walk(scope.root or "/")}
    flat = {"prefix": scope.prefix} if hasattr(fs, "call_s3") and scope.prefix else {}
    try:
        return fs.find(scope.root, detail=True, **flat)
    except FileNotFoundError as error:
        if "bucket" in str(error).lower():
            raise
        return {}


def _walk(root: str) -> Iterator[str]:
    """Files below a local folder, links followed; hidden folders are not entered. Raises OSError."""
    if not os.path.isdir(root):
        yield from [root] if os.path.lexists(root) else []
        return
    entered = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:  # a link to a folder above
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        yield from (f"{folder.rstrip('/')}/{name}" for name in names if not name.startswith(HIDDEN))


def _raise(error: OSError) -> None:
    raise error


def _local_entry(path: str) -> dict[str, Any]:
    """Size and modification time of the file at a path, links followed. Raises StorageError for a link to nothing."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise StorageError(f"{path} is a link to nothing. Mend or remove it") from error
        raise
    kind = "file" if stat.S_ISREG(status.st_mode) else "other"
    return {"type": kind, "size": status.st_size, "mtime": status.st_mtime}


def _tag(entry: Mapping[str, Any]) -> str:
    """The etag or modification time of an entry, under the names that filesystems use."""
    keys = ("ETag", "etag", "mtime", "LastModified", "updated", "last_modified")
    return next((str(entry[key]).strip('"') for key in keys if entry.get(key)), "")

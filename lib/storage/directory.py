"""Local folders as objects: uploaded, visible only when complete, downloaded."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from .folder import Folder

FILES = "_files.json"  # names, sizes and checksums; written last, so that a folder with it is complete


def upload_directory(source: Path, target: Folder) -> None:
    """Upload every file below `source`, and then the list of them. Memory: the largest file."""
    files = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name != FILES):
        name = file.relative_to(source).as_posix()
        data = file.read_bytes()
        target.publish(name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    target.publish(FILES, json.dumps(files, indent=1).encode())


def is_complete(target: Folder) -> bool:
    """Whether every file of the folder is uploaded."""
    return target.exists(FILES)


def download_directory(source: Folder, target: Path) -> Path:
    """Download a complete folder into one below `target`, which is named by its content. Returns that folder.

    Raises FileNotFoundError for an incomplete folder, StorageError for a file whose content is not the listed one.
    """
    listed = source.read(FILES)
    place = target / hashlib.sha256(listed).hexdigest()[:12]
    if place.is_dir():
        return place
    unfinished = place.with_name(f".{place.name}-{os.getpid()}")
    for name, entry in json.loads(listed).items():
        if name.startswith("/") or ".." in name.split("/"):
            raise StorageError(f"{source.url} lists {name!r}, which lies outside of it. It is not one of ours")
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        data = source.read(name)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise StorageError(f"{source.path(name)} is not what {FILES} says of it. Upload it again")
        (unfinished / name).write_bytes(data)
    with suppress(OSError):  # another process was first
        unfinished.rename(place)
    shutil.rmtree(unfinished, ignore_errors=True)
    return place


def remove_directory(target: Folder) -> None:
    """Remove a folder: the list of its files first, so that a half of it never looks complete."""
    target.remove(FILES)
    target.remove_all()

"""Local folders as objects: uploaded whole, seen only when whole, and brought back."""

import json
from pathlib import Path

from .storage import Folder

FILES = "_files.json"  # names and sizes; written last, so a folder that has it is whole


def upload(source: Path, target: Folder) -> None:
    """Every file below `source`, and then the list of them. Memory: the largest file."""
    sizes = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        data = file.read_bytes()
        folder, _, last = name.rpartition("/")
        (target.below(folder) if folder else target).publish(last, data)
        sizes[name] = len(data)
    target.publish(FILES, json.dumps(sizes, indent=1).encode())


def is_whole(target: Folder) -> bool:
    return target.exists(FILES)


def download(source: Folder, target: Path) -> Path:
    """Bring the files of a whole folder, those that are not there yet. Raises FileNotFoundError for one that is not whole."""
    for name, size in json.loads(source.read(FILES)).items():
        place = target / name
        if place.is_file() and place.stat().st_size == size:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        folder, _, last = name.rpartition("/")
        unfinished = place.with_name(f".{place.name}.part")
        unfinished.write_bytes((source.below(folder) if folder else source).read(last))
        unfinished.rename(place)
    return target


def remove(target: Folder) -> None:
    """Take a folder away; the list of its files first, so that it is never taken for whole."""
    target.remove(FILES)
    target.remove_all()

"""What a run is: its settings, in the object that is created first in its folder and never changed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import RunError
from ..storage.folder import Folder
from .parts import RUN

LETTERS = 200  # of a value that is told


def read_run_config(folder: Folder) -> dict[str, Any] | None:
    try:
        return json.loads(folder.read(RUN))
    except FileNotFoundError:
        return None


def create_run_config(folder: Folder, record: dict[str, Any]) -> dict[str, Any]:
    """Create _run.json unless another driver was first; what is stored is what counts."""
    key = hashlib.sha256(json.dumps(record["settings"], sort_keys=True).encode()).hexdigest()[:16]
    folder.claim(RUN, json.dumps(record | {"key": key}, indent=1, sort_keys=True).encode())
    return json.loads(folder.read(RUN))


def check_same_settings(folder: Folder, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    new = json.loads(json.dumps(new))
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if differing:
        said = "; ".join(f"{name}: there {_short(old.get(name))}, asked {_short(new.get(name))}" for name in differing)
        raise RunError(f"{folder.url} holds another run ({said}). Choose a new --output, or ask for the same")


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= LETTERS else f"{said[:LETTERS]}... ({len(said):,} letters)"

"""The settings of a run, in the object that is created first in its folder and never changed."""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import RunError
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from .parts import RUN

MAX_LETTERS = 200  # of a value in an error message


def read_run_config(folder: Folder) -> dict[str, Any] | None:
    """The run config of a folder; None where there is no run."""
    try:
        return json.loads(folder.read(RUN))
    except FileNotFoundError:
        return None


def create_run_config(folder: Folder, run_config: dict[str, Any]) -> dict[str, Any]:
    """Create _run.json unless another driver was first; the stored one counts. `key` is added: it names the parts."""
    key = fingerprint(run_config["settings"], digits=16)
    folder.claim(RUN, json.dumps(run_config | {"key": key}, indent=1, sort_keys=True).encode())
    return json.loads(folder.read(RUN))


def check_same_settings(folder: Folder, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raises RunError that spells out the difference, when the folder holds a run with other settings."""
    requested = json.loads(json.dumps(requested))
    differing = [name for name in sorted({*stored, *requested}) if stored.get(name) != requested.get(name)]
    if differing:
        difference = "; ".join(
            f"{name}: there {_short(stored.get(name))}, asked {_short(requested.get(name))}" for name in differing
        )
        raise RunError(f"{folder.url} holds another run ({difference}). Choose a new --output, or ask for the same")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]}... ({len(text):,} letters)"

"""Short names for settings and lists of files: equal values have equal fingerprints in every process and version."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

DIGITS = 12  # hex digits: of a million names, two are equal with a probability of 1 in 500


def fingerprint(*values: Any, digits: int = DIGITS) -> str:
    """Hash the values as canonical JSON with sha256; the first `digits` hex digits. Classes and fields may be renamed.

    Raises TypeError for values other than JSON, tuples, paths and frozen dataclasses: their text could differ by process.
    """
    plain = [_plain(value) for value in values]
    text = json.dumps(plain[0] if len(plain) == 1 else plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(type(value)) and type(value).__dataclass_params__.frozen:
        return [_plain(getattr(value, each.name)) for each in fields(value)]
    if isinstance(value, Mapping) and all(type(name) is str for name in value):
        return {name: _plain(each) for name, each in value.items()}
    raise TypeError(
        f"{value!r} is {type(value).__name__}, which has no fingerprint. Give JSON values, tuples, paths or frozen dataclasses"
    )

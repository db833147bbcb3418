"""Bytes and seconds in words, and back."""

import re

from ..errors import UsageError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> float:
    """Read `64GB`, `64GiB` or `500m` as bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise UsageError(f"--memory {text!r} is no size. Write it as 64GB or 64GiB")
    return float(match[1]) * UNITS[match[2]]


def format_bytes(size: float) -> str:
    """Write bytes as MiB, or as GiB where they are more than one."""
    if size < 2**30:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / 2**30:,.{2 if size < 100 * 2**30 else 0}f} GiB"


def format_duration(seconds: float) -> str:
    """Write seconds as 1:02:03, or as 2:03 under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

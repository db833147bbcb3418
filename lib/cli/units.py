"""Bytes: of the pieces that an index is cut into, and in words."""

import math
import re

from ..errors import UsageError

PIECE_BYTES = 512 << 20  # of codes in a piece, about; the worker that fills it holds up to twice as much
CENTROIDS_OVER = 2  # times the centroids' bytes, which every piece repeats: more where they are large
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def pieces_for(codes: float, repeated: float, merged: int = 1) -> int:
    """How many pieces bytes of codes are cut into. repeated: bytes of the empty index, in each. merged: indexes that are made of
    them, of as many pieces each."""
    count = max(1, math.ceil(codes / max(PIECE_BYTES, CENTROIDS_OVER * repeated)))
    return -(-count // merged) * merged


def parse_bytes(text: str) -> float:
    """`64GB`, `64GiB`, `500m` in bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise UsageError(f"--memory {text!r} is no size. Write it as 64GB or 64GiB")
    return float(found[1]) * UNITS[found[2]]


def format_bytes(size: float) -> str:
    """Bytes as MiB, or GiB where they are more than one."""
    if size < 2**30:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / 2**30:,.2f} GiB" if size < 100 * 2**30 else f"{size / 2**30:,.0f} GiB"

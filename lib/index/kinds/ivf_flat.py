"""Inverted lists of float32 vectors: exact within the probed lists."""

from dataclasses import dataclass
from typing import ClassVar

from . import IndexKind


@dataclass(frozen=True)
class IvfFlat(IndexKind):
    """float32 vectors."""

    recall: ClassVar[float] = 1.0

    def key(self, dim: int) -> str:
        return "{lists},Flat"

    def bytes(self, dim: int) -> float:
        return 4.0 * dim


KIND = IvfFlat

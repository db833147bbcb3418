"""Inverted lists of residuals, scalar quantization with a byte a dimension."""

from dataclasses import dataclass
from typing import ClassVar

from . import IndexKind


@dataclass(frozen=True)
class IvfSq8(IndexKind):
    """256 even steps between the minimum and the maximum of each dimension in the training sample."""

    recall: ClassVar[float] = 0.98

    def key(self, dim: int) -> str:
        return "{lists},SQ8"

    def bytes(self, dim: int) -> float:
        return float(dim)


KIND = IvfSq8

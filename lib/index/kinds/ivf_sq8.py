"""Inverted lists of residuals, scalar quantization with a byte a dimension."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import faiss_codes, list_parameters


@dataclass(frozen=True)
class IvfSq8:
    """256 even steps between the minimum and the maximum of each dimension in the training sample."""

    has_lists: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    search_parameter: ClassVar[str] = "nprobe"
    recall: ClassVar[float] = 0.98

    def check(self, dim: int) -> None:
        pass

    def key(self, dim: int) -> str:
        return "{lists},SQ8"

    def bytes(self, dim: int) -> float:
        return float(dim)

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        return faiss_codes(inner, points, lists)

    def parameters(self, **chosen: Any) -> Any:
        return list_parameters(**chosen)

    def finalize(self, index: Any) -> Any:
        return index


KIND = IvfSq8

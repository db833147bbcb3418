"""Inverted lists of float32 vectors: exact within the probed lists."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import faiss_codes, list_parameters


@dataclass(frozen=True)
class IvfFlat:
    """float32 vectors."""

    has_lists: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    search_parameter: ClassVar[str] = "nprobe"
    recall: ClassVar[float] = 1.0

    def check(self, dim: int) -> None:
        pass

    def key(self, dim: int) -> str:
        return "{lists},Flat"

    def bytes(self, dim: int) -> float:
        return 4.0 * dim

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        return faiss_codes(inner, points, lists)

    def parameters(self, **chosen: Any) -> Any:
        return list_parameters(**chosen)

    def finalize(self, index: Any) -> Any:
        return index


KIND = IvfFlat

"""Exact search: every vector is compared with every query."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import own_bytes


@dataclass(frozen=True)
class Flat:
    """float32 vectors, no training."""

    has_lists: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    search_parameter: ClassVar[str] = ""
    recall: ClassVar[float] = 1.0

    def check(self, dim: int) -> None:
        pass

    def key(self, dim: int) -> str:
        return "IDMap,Flat"

    def bytes(self, dim: int) -> float:
        return 4.0 * dim

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        return own_bytes(points)

    def parameters(self, **chosen: Any) -> Any:
        import faiss

        return faiss.SearchParameters(**chosen)

    def finalize(self, index: Any) -> Any:
        return index


KIND = Flat

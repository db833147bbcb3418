"""Exact search: every vector is compared with every query."""

from dataclasses import dataclass
from typing import Any, ClassVar

import faiss
import numpy as np

from . import IndexKind


@dataclass(frozen=True)
class Flat(IndexKind):
    """float32 vectors, no training."""

    has_lists: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    search_parameter: ClassVar[str] = ""
    recall: ClassVar[float] = 1.0

    def key(self, dim: int) -> str:
        return "IDMap,Flat"

    def bytes(self, dim: int) -> float:
        return 4.0 * dim

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(points).view(np.uint8)

    def parameters(self, **chosen: Any) -> Any:
        return faiss.SearchParameters(**chosen)


KIND = Flat

"""A graph of near neighbours over float32 vectors (Malkov and Yashunin, arXiv 1603.09320), for small corpora.

One thread builds it: with several the links depend on their timing, and a resumed build would differ.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UsageError
from . import own_bytes


@dataclass(frozen=True)
class Hnsw:
    """links: of a vector on each upper level; the lowest level has twice as many."""

    links: int = 32
    has_lists: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    search_parameter: ClassVar[str] = "efSearch"
    recall: ClassVar[float] = 0.99

    def check(self, dim: int) -> None:
        if not 2 <= self.links <= 512:
            raise UsageError(f"--kind hnsw:links={self.links}: choose from 2 to 512")

    def key(self, dim: int) -> str:
        return f"IDMap,HNSW{self.links},Flat"

    def bytes(self, dim: int) -> float:
        return 4.0 * dim + 4.0 * 2 * self.links * 1.06  # 1.06: the upper levels

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        return own_bytes(points)

    def parameters(self, **chosen: Any) -> Any:
        import faiss

        return faiss.SearchParametersHNSW(**chosen)  # type: ignore[attr-defined]

    def finalize(self, index: Any) -> Any:
        return index


KIND = Hnsw

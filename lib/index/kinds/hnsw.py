"""A graph of near neighbours over float32 vectors (Malkov and Yashunin, arXiv 1603.09320), for small corpora.

One thread builds it: with several the links depend on their timing, and a resumed build would differ.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import faiss

from ...errors import UsageError
from .flat import Flat


@dataclass(frozen=True)
class Hnsw(Flat):
    """links: of a vector on each upper level; the lowest level has twice as many."""

    links: int = 32
    search_parameter: ClassVar[str] = "efSearch"
    recall: ClassVar[float] = 0.99

    def check(self, dim: int) -> None:
        if not 2 <= self.links <= 512:
            raise UsageError(f"--kind hnsw:links={self.links}: choose from 2 to 512")

    def key(self, dim: int) -> str:
        return f"IDMap,HNSW{self.links},Flat"

    def bytes(self, dim: int) -> float:
        return super().bytes(dim) + 4.0 * 2 * self.links * 1.06  # 1.06: the upper levels

    def parameters(self, **chosen: Any) -> Any:
        return faiss.SearchParametersHNSW(**chosen)  # type: ignore[attr-defined]


KIND = Hnsw

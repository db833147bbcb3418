"""Inverted lists with RaBitQ (Gao and Long, arXiv 2405.12497; more bits: arXiv 2409.09913): a random rotation, then 1 to 4 bits
a dimension with an unbiased estimate of the product. Nothing to train but the lists."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UsageError

RECALL = {1: 0.60, 2: 0.76, 3: 0.86, 4: 0.92}


@dataclass(frozen=True)
class IvfRabitq:
    """bits: a dimension. The rotation is one matrix for all; without it a few strong dimensions spoil the codes."""

    bits: int = 4
    lists: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    effort: ClassVar[str] = "nprobe"

    @property
    def recall(self) -> float:
        return RECALL[self.bits]

    def check(self, dim: int) -> None:
        if self.bits not in RECALL:
            raise UsageError(f"--kind ivf-rabitq:bits={self.bits}: choose from {', '.join(map(str, RECALL))}")

    def key(self, dim: int) -> str:
        return f"RR{dim},{{lists}},RaBitQ{self.bits if self.bits > 1 else ''}"

    def bytes(self, dim: int) -> float:
        return dim * self.bits / 8 + (8 if self.bits == 1 else 20)

    def parameters(self, **chosen: Any) -> Any:
        import faiss

        return faiss.SearchParametersPreTransform(index_params=faiss.IVFRaBitQSearchParameters(**chosen))  # type: ignore[call-arg]

    def finished(self, index: Any) -> Any:
        return index


KIND = IvfRabitq

"""Inverted lists with 4-bit product quantization, laid out so that a processor scans 32 codes at once (Andre et al., PVLDB 9(4),
2015). faiss cannot merge this layout on disk: it stays in segments."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import faiss

from ...errors import UsageError
from . import IndexKind, divisors, lists_of, to_spec


@dataclass(frozen=True)
class IvfPqFastscan(IndexKind):
    """groups: of dimensions, half a byte each; 0 for a group per 4 dimensions, or a few more."""

    groups: int = 0
    mergeable: ClassVar[bool] = False
    recall: ClassVar[float] = 0.60

    def check(self, dim: int) -> None:
        if dim % self._groups(dim) or self._groups(dim) % 2:
            raise UsageError(
                f"--kind {to_spec(replace(self, groups=self._groups(dim)))}: it must be even, and divide the vectors' {dim} "
                f"dimensions, as {', '.join(map(str, _even(dim))) or 'none'} do. ivf-rabitq takes any number of them"
            )

    def key(self, dim: int) -> str:
        return f"{{lists}},PQ{self._groups(dim)}x4np"

    def bytes(self, dim: int) -> float:
        return self._groups(dim) / 2

    def finalize(self, index: Any) -> Any:
        """Lay the codes out in faiss's blocks of 32. The order of equal distances may differ from the plain layout's."""
        packed: Any = faiss.IndexIVFPQFastScan(lists_of(index))
        packed.referenced_objects = [index]  # it goes on using that one's centroids
        return packed

    def _groups(self, dim: int) -> int:
        return self.groups or max((count for count in _even(dim) if count <= dim // 4), default=1)


def _even(dim: int) -> list[int]:
    return [count for count in divisors(dim) if count % 2 == 0]


KIND = IvfPqFastscan

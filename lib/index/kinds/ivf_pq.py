"""Inverted lists with product quantization (Jegou et al., IEEE PAMI 33(1), 2011): a byte for each group of dimensions."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ...errors import UsageError
from . import IndexKind, divisors, to_spec

MOST_DIMENSIONS = 64  # a byte, unless `code` is given: a byte for more of them has next to no information


@dataclass(frozen=True)
class IvfPq(IndexKind):
    """code: bytes a vector; 0 for a byte per 8 dimensions, or a few more. Fewer dimensions a byte train 15 times slower.

    Polysemous training is off: it takes ten times as long and serves a filter that is not used here.
    """

    code: int = 0
    recall: ClassVar[float] = 0.65

    def check(self, dim: int) -> None:
        code = self._code(dim)
        if dim % code or (not self.code and code * MOST_DIMENSIONS < dim):
            fitting = [count for count in divisors(dim) if count * MOST_DIMENSIONS >= dim]
            raise UsageError(
                f"--kind {to_spec(replace(self, code=code))}: it must divide the vectors' {dim} dimensions, as "
                f"{', '.join(map(str, fitting))} do. ivf-rabitq takes any number of them"
            )

    def key(self, dim: int) -> str:
        return f"{{lists}},PQ{self._code(dim)}np"

    def bytes(self, dim: int) -> float:
        return float(self._code(dim))

    def _code(self, dim: int) -> int:
        return self.code or max(count for count in divisors(dim) if count <= max(1, dim // 8))


KIND = IvfPq

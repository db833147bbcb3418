"""Kinds of index, one file each: a frozen dataclass of parameters that says which faiss index it is, and what it costs.

`name:key=value` on the command line is `name.py`'s KIND. A kind with lists has a coarse quantizer: a vector goes to the list
of its nearest centroid, and is kept there as a code of what is left. One without lists keeps the vectors as they are.
"""

import importlib
import pkgutil
from dataclasses import fields
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from ...errors import UsageError

Metric = Literal["cosine", "ip", "l2"]
ID_BYTES = 8  # of a vector's number, beside its code
FLAT_LISTS = 65_536  # centroids up to which a vector is held against every one; above it a graph finds the nearest
GRAPH = 32  # links a centroid
CODEBOOK_ITERATIONS = 6  # of a product quantizer's k-means, where faiss does 25; LOG.md has what they would bring
CODEBOOK_POINTS = 12_800  # that it is trained on, where faiss takes 65,536
QUERY_BITS = (
    8  # a dimension of RaBitQ's queries, where faiss keeps 4: recall@10 of 1 bit 0.010 more, in 1.1 times the time
)


class IndexKind(Protocol):
    """lists: whether it has inverted lists. merges: whether faiss can merge its pieces on disk. effort: faiss's parameter by
    which a search is quicker or finds more, or none. recall: expected at 10 with effort enough, of MiniLM's 384 dimensions
    (docs/index.md): a guide to a choice, never a claim about a built index."""

    has_lists: ClassVar[bool]
    mergeable: ClassVar[bool]
    search_parameter: ClassVar[str]

    @property
    def recall(self) -> float: ...

    def check(self, dim: int) -> None:
        """Raises UsageError where vectors of so many dimensions cannot be kept so."""
        ...

    def key(self, dim: int) -> str:
        """What faiss's index_factory calls it; `{lists}` stands for the coarse quantizer."""
        ...

    def bytes(self, dim: int) -> float:
        """Of a vector in memory, its number apart."""
        ...

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """uint8 [n, code]: what is kept of vectors as the lists see them, float32 [n, dim], in those lists, int64 [n]. inner: the
        part of the trained faiss index with the lists, where there are some."""
        ...

    def parameters(self, **chosen: Any) -> Any:
        """faiss's parameters of one search: its `effort` by name, and `sel`, the numbers that may be found."""
        ...

    def finished(self, index: Any) -> Any:
        """What is written, of a filled faiss index."""
        ...


def names() -> list[str]:
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]


def parse(text: str) -> IndexKind:
    """The kind of `name:key=value,...`. Raises UsageError with the choices for what does not exist."""
    name, _, rest = text.partition(":")
    if name.replace("_", "-") not in names():
        raise UsageError(f"--kind {name!r}: choose from auto, {', '.join(names())}")
    kind = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").KIND
    known = [each.name for each in fields(kind)]
    given: dict[str, int] = {}
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if key not in known:
            raise UsageError(f"--kind {text!r}: {name} has no {key!r}. It has {', '.join(known) or 'no parameter'}")
        if not (value.isascii() and value.isdigit()):
            raise UsageError(f"--kind {text!r}: {key}={value!r} is not a whole number")
        given[key] = int(value)
    return kind(**given)


def divisors(dim: int) -> list[int]:
    """Into how many equal groups so many dimensions can be cut, the fewest first."""
    return [count for count in range(1, dim + 1) if dim % count == 0]


def to_spec(kind: IndexKind) -> str:
    """A kind as the command line says it, every parameter written out."""
    name = type(kind).__module__.rsplit(".", 1)[-1].replace("_", "-")
    values = ",".join(f"{each.name}={getattr(kind, each.name)}" for each in fields(kind))  # type: ignore[arg-type]
    return f"{name}:{values}" if values else name


def empty_index(kind: IndexKind, dim: int, lists: int, metric: Metric) -> Any:
    """The empty faiss index, its settings as this project wants them. lists: of a kind that has some."""
    import faiss

    coarse = f"IVF{lists}" if lists <= FLAT_LISTS else f"IVF{lists}_HNSW{GRAPH}"
    number = faiss.METRIC_INNER_PRODUCT if uses_inner_product(kind, metric) else faiss.METRIC_L2
    index = faiss.index_factory(dim, kind.key(dim).format(lists=coarse), number)
    if kind.has_lists:
        inner = lists_of(index)
        if hasattr(inner, "pq"):
            inner.pq.cp.niter = CODEBOOK_ITERATIONS
            inner.pq.cp.max_points_per_centroid = CODEBOOK_POINTS // inner.pq.ksub
        if hasattr(inner, "qb"):
            inner.qb = QUERY_BITS
    return index


def uses_inner_product(kind: IndexKind, metric: Metric) -> bool:
    """Whether faiss ranks by inner products, or by squared distances.

    Cosines are products of unit vectors, and rank as distances do. A code's error e spoils a product by q e, whatever the
    vector, a distance from a near one by (q - x) e, which is less: recall@10 of ivf-pq 0.76 instead of 0.57 (LOG.md).
    """
    return metric == "ip" or (metric == "cosine" and not kind.has_lists)


def scores_of(kind: IndexKind, metric: Metric, found: np.ndarray) -> np.ndarray:
    """What faiss gives, as scores of which more is better: cosines, inner products, negative squared distances."""
    if uses_inner_product(kind, metric):
        return found
    return 1 - found / 2 if metric == "cosine" else -found


def search_parameter_values(kind: IndexKind, lists: int) -> tuple[int, ...]:
    """The ladder on which recall and speed are measured: powers of two."""
    if not kind.search_parameter:
        return (0,)
    first, last = (1, min(lists, max(16, lists // 8), 1024)) if kind.has_lists else (16, 512)
    return tuple(2**power for power in range(first.bit_length() - 1, last.bit_length()))


def set_search_parameter(kind: IndexKind, index: Any, effort: int) -> None:
    """How hard the next searches of a faiss index try."""
    import faiss

    if kind.search_parameter:
        faiss.ParameterSpace().set_index_parameter(index, kind.search_parameter, effort)


def faiss_codes(inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """The codes as faiss itself makes them, uint8 [n, code]."""
    import faiss

    points, codes = np.ascontiguousarray(points), np.empty((len(points), inner.code_size), np.uint8)
    inner.encode_vectors(len(points), faiss.swig_ptr(points), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
    return codes


def own_bytes(points: np.ndarray) -> np.ndarray:
    """The vectors as they are, uint8 [n, 4 dim]."""
    return np.ascontiguousarray(points).view(np.uint8)


def centroids_of(inner: Any) -> np.ndarray:
    """A view of the lists' centroids, float32 [lists, dim]."""
    import faiss

    quantizer: Any = faiss.downcast_index(inner.quantizer)
    flat: Any = faiss.downcast_index(quantizer.storage) if hasattr(quantizer, "storage") else quantizer
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(-1, flat.d)


def list_parameters(**chosen: Any) -> Any:
    """faiss's parameters of a search in inverted lists."""
    import faiss

    return faiss.SearchParametersIVF(**chosen)


def lists_of(index: Any) -> Any:
    """The part of an index with inverted lists, behind whatever turns the vectors first."""
    import faiss

    found: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    found.referenced_objects = [index]  # it is a part of it, and faiss would let the whole go
    return found

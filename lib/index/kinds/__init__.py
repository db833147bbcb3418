"""Kinds of index, one file each: a frozen dataclass of parameters that names the faiss index and tells its cost.

`name:key=value` on the command line is `name.py`'s KIND. A kind with inverted lists has a coarse quantizer: a vector goes to the
list of its nearest centroid and is stored there as a code of its residual. A kind without lists stores the vectors themselves.
"""

import importlib
import pkgutil
from dataclasses import fields
from typing import Any, ClassVar, Literal, Protocol

import faiss
import numpy as np

from ...errors import UsageError

Metric = Literal["cosine", "ip", "l2"]
ID_BYTES = 8  # of a vector's number, beside its code
FLAT_LISTS = 65_536  # centroids up to which a vector is compared with all of them; above it a graph finds the nearest
GRAPH = 32  # links a centroid
CODEBOOK_ITERATIONS = 6  # of a product quantizer's k-means; faiss does 25, and LOG.md has what they would bring
CODEBOOK_POINTS = 12_800  # training vectors of a codebook; faiss takes 65,536
# Bits a dimension of RaBitQ's queries. faiss keeps 4; 8 give 1-bit codes 0.010 more recall@10, in 1.1 times the time.
QUERY_BITS = 8


class FaissIvf(Protocol):
    """The members in use of faiss.IndexIVF. invlists and `encode_vectors` take pointers of faiss's bindings."""

    metric_type: int
    ntotal: int
    nlist: int
    code_size: int
    quantizer: Any
    invlists: Any

    def encode_vectors(self, n: int, x: Any, list_nos: Any, codes: Any) -> None: ...


class IndexKind(Protocol):
    """A kind with its parameters, and the base of every kind. The defaults are those of inverted lists with faiss's own codes.

    has_lists: it has inverted lists, of which a search scans some. mergeable: faiss can merge its segments on disk.
    search_parameter: faiss's name of the parameter that trades speed for recall, "nprobe" or "efSearch"; "" for exact search.
    recall: expected recall@10 at a sufficient value of that parameter, for MiniLM's 384 dimensions (docs/index.md): a guide for
    choosing, never a claim about a built index.
    """

    has_lists: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    search_parameter: ClassVar[str] = "nprobe"

    @property
    def recall(self) -> float: ...

    def check(self, dim: int) -> None:
        """Raise UsageError where this kind cannot store vectors of `dim` dimensions."""

    def key(self, dim: int) -> str:
        """The string for faiss's index_factory; `{lists}` stands for the coarse quantizer."""
        ...

    def bytes(self, dim: int) -> float:
        """Bytes of a vector in memory, without its number."""
        ...

    def codes(self, inner: Any, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """The codes of rotated vectors, uint8 [n, code].

        inner: the trained FaissIvf with the lists; None for a kind without. points: float32 [n, dim]. lists: of each point, int64
        [n].
        """
        return faiss_codes(inner, points, lists)

    def parameters(self, **chosen: Any) -> Any:
        """faiss's parameters of one search: `search_parameter` by its name, and `sel`, a selector of the numbers to search."""
        return faiss.SearchParametersIVF(**chosen)

    def finalize(self, index: Any) -> Any:
        """The index to write, from a filled faiss index."""
        return index


def names() -> list[str]:
    """Every kind, as the command line spells it."""
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)]


def parse(text: str) -> IndexKind:
    """The kind of `name:key=value,...`. Raises UsageError with the choices for an unknown name or key."""
    name, _, rest = text.partition(":")
    if name.replace("_", "-") not in names():
        raise UsageError(f"--kind {name!r}: choose from auto, {', '.join(names())}")
    kind = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").KIND
    known = [each.name for each in fields(kind)]
    parameters: dict[str, int] = {}
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if key not in known:
            raise UsageError(f"--kind {text!r}: {name} has no {key!r}. It has {', '.join(known) or 'no parameter'}")
        if not (value.isascii() and value.isdigit()):
            raise UsageError(f"--kind {text!r}: {key}={value!r} is not a whole number")
        parameters[key] = int(value)
    return kind(**parameters)


def divisors(dim: int) -> list[int]:
    """The numbers of equal groups that `dim` dimensions can be cut into, in order."""
    return [count for count in range(1, dim + 1) if dim % count == 0]


def to_spec(kind: IndexKind) -> str:
    """The text of a kind on the command line, with every parameter."""
    name = type(kind).__module__.rsplit(".", 1)[-1].replace("_", "-")
    values = ",".join(f"{each.name}={getattr(kind, each.name)}" for each in fields(kind))  # type: ignore[arg-type]
    return f"{name}:{values}" if values else name


def empty_index(kind: IndexKind, dim: int, lists: int, metric: Metric) -> Any:
    """The untrained faiss index, with the settings above. lists: the number of inverted lists; 0 for a kind without."""
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
    """Whether faiss ranks by inner products; else by squared distances.

    For cosine with inverted lists we use distances of unit vectors: they rank alike, with a smaller error. A code's error e changes
    a product by q e for every vector, but the distance to a near vector x by (q - x) e. recall@10 of ivf-pq is 0.76 with distances
    and 0.57 with products (LOG.md).
    """
    return metric == "ip" or (metric == "cosine" and not kind.has_lists)


def scores_of(kind: IndexKind, metric: Metric, values: np.ndarray) -> np.ndarray:
    """Scores, greater is better, from the values of a faiss search: cosines, inner products, or negative squared distances."""
    if uses_inner_product(kind, metric):
        return values
    return 1 - values / 2 if metric == "cosine" else -values


def search_parameter_values(kind: IndexKind, lists: int) -> tuple[int, ...]:
    """The values of the search parameter at which recall and speed are measured: powers of two; (0,) for exact search."""
    if not kind.search_parameter:
        return (0,)
    first, last = (1, min(lists, max(16, lists // 8), 1024)) if kind.has_lists else (16, 512)
    return tuple(2**power for power in range(first.bit_length() - 1, last.bit_length()))


def set_search_parameter(kind: IndexKind, index: Any, value: int) -> None:
    """Set nprobe or efSearch for the next searches of a faiss index."""
    if kind.search_parameter:
        faiss.ParameterSpace().set_index_parameter(index, kind.search_parameter, value)


def faiss_codes(inner: FaissIvf, points: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """The codes that faiss itself computes, uint8 [n, code]."""
    points, codes = np.ascontiguousarray(points), np.empty((len(points), inner.code_size), np.uint8)
    inner.encode_vectors(len(points), faiss.swig_ptr(points), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
    return codes


def centroids_of(inner: FaissIvf) -> np.ndarray:
    """A view of the lists' centroids, float32 [lists, dim]."""
    quantizer: Any = faiss.downcast_index(inner.quantizer)
    flat: Any = faiss.downcast_index(quantizer.storage) if hasattr(quantizer, "storage") else quantizer
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(-1, flat.d)


def lists_of(index: Any) -> Any:
    """The FaissIvf inside an index, behind its rotation."""
    inner: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    inner.referenced_objects = [index]  # inner belongs to index, which Python would free
    return inner

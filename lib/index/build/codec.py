"""Vectors to lists and codes with a trained index, and back into one, as one process would add them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kinds import IndexKind, centroids_of, lists_of
from .nearest_centroid import Centroids
from .threads import Rotation, as_tensor

CHECKED = 512  # vectors, of those that are encoded together, whose error stands for that of all


def load_index(data: bytes | memoryview) -> Any:
    import faiss

    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def save_index(index: Any) -> bytes:
    import faiss

    return faiss.serialize_index(index).tobytes()


def open_piece(path: str) -> Any:
    """A piece without reading its lists into memory: they come as pages of the file."""
    import faiss

    return faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)


def open_merged(path: str) -> Any:
    """A merged index, whose lists are in the .ivfdata file beside it, wherever both were moved to.

    IO_FLAG_MMAP holds the bit of IO_FLAG_SKIP_IVF_DATA, and with it such an index has no lists: a search ends the process.
    """
    import faiss

    return faiss.read_index(path, faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)


def transforms_of(index: Any) -> list[Any]:
    """What an index does to vectors before its lists see them: its rotation, where it has one."""
    import faiss

    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    return [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())] if chain else []


def rotate(index: Any, vectors: np.ndarray) -> np.ndarray:
    """The vectors as the lists of the index see them: as faiss turns them, but for a sum's rounding."""
    import faiss

    for turn in transforms_of(index):
        assert not turn.have_bias, "a rotation"
        matrix = faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in)
        vectors = Rotation(as_tensor(matrix.T))(as_tensor(vectors)).numpy()
    return np.ascontiguousarray(vectors)


def error_stride(count: int) -> slice:
    """Of so many vectors those that are held against their centroids."""
    return slice(None, None, max(1, count // CHECKED))


def quantization_error(errors: np.ndarray) -> float:
    """Of `Coder.errors`: 0 at best, about 1 where the centroids say nothing of the vectors."""
    return float(errors[0] / errors[1]) if errors[1] else 0.0


class Coder:
    """A trained index as a function of vectors."""

    def __init__(self, kind: IndexKind, index: Any) -> None:
        self._kind, self._index = kind, index
        self._lists: Any = lists_of(index) if kind.has_lists else None
        self._nearest = nearest_of(self._lists.quantizer) if self._lists is not None else None

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """vectors: float32 [n, dim]. Lists, int64 [n], zeros where the kind has none; and codes, uint8 [n, code]."""
        points = rotate(self._index, vectors)
        lists = self._nearest(points) if self._nearest else np.zeros(len(points), np.int64)
        return lists, self._kind.codes(self._lists, points, lists)

    def errors(self, vectors: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """float64 [2]: the sums of the squared distances of vectors from the centroids of their lists (int64 [n], as `encode`
        finds them), and of their own squares. Of an index without lists 0."""
        if self._nearest is None or not len(vectors):
            return np.zeros(2)
        points = rotate(self._index, vectors)
        near = centroids_of(self._lists)[lists]
        return np.array([np.sum((points - near) ** 2, dtype=np.float64), np.sum(points**2, dtype=np.float64)])


def nearest_of(quantizer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The nearest of a quantizer's centroids to each vector, int64 [n]: of all, or as a graph finds them."""
    import faiss

    quantizer = faiss.downcast_index(quantizer)
    if isinstance(quantizer, faiss.IndexFlat):
        products = quantizer.metric_type == faiss.METRIC_INNER_PRODUCT
        return Centroids(quantizer.reconstruct_n(0, quantizer.ntotal), products).nearest
    return lambda vectors: np.ascontiguousarray(quantizer.search(vectors, 1)[1][:, 0])


def fill(kind: IndexKind, index: Any, numbers: np.ndarray, lists: np.ndarray, codes: np.ndarray) -> None:
    """Add encoded vectors to an index. numbers: what faiss will call them, int64 [n]."""
    import faiss

    if not kind.has_lists:
        index.add_with_ids(np.ascontiguousarray(codes).view(np.float32), numbers)
        return
    inner = lists_of(index)
    order = np.argsort(lists, kind="stable")
    numbers, codes = np.ascontiguousarray(numbers[order]), np.ascontiguousarray(codes[order])
    held, starts = np.unique(lists[order], return_index=True)
    for place, start, stop in zip(held, starts, [*starts[1:], len(lists)], strict=True):
        given = numbers[start:stop], codes[start:stop]
        inner.invlists.add_entries(int(place), int(stop - start), *map(faiss.swig_ptr, given))
    inner.ntotal += len(numbers)
    index.ntotal = inner.ntotal

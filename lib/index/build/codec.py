"""The codec of a trained index: encode vectors (list number and code), the mapper that encodes shards, and fill an index from
stored codes, as if faiss had added the vectors in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from ...data.shards import Shard
from ...engine.mapper import FusedMapper, Result
from ...storage.folder import Folder
from ..kinds import FaissIvf, IndexKind, centroids_of, lists_of
from .layout import CODE, LIST, TRAINED
from .rotation import Rotation
from .stage_parts import binary_column
from .threads import as_tensor, compute_with
from .vector_source import VectorRows, VectorSource

ERROR_VECTORS = 512  # of a batch, about: their quantization error is the estimate for all

Nearest = Callable[[np.ndarray], np.ndarray]


def load_index(data: bytes | memoryview) -> Any:
    """An index of a file's bytes."""
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def save_index(index: Any) -> bytes:
    """The bytes of an index's file."""
    return faiss.serialize_index(index).tobytes()


def open_segment(path: str) -> Any:
    """Open a segment without reading its lists into memory: they are mapped pages of the file."""
    return faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)


def open_merged(path: str) -> Any:
    """Open a merged index, whose lists are in the .ivfdata file beside it, also after both were moved.

    Without IO_FLAG_MMAP: its bits include those of IO_FLAG_SKIP_IVF_DATA, which leave a merged index without lists, and a search
    would end the process.
    """
    return faiss.read_index(path, faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)


def transforms_of(index: Any) -> list[Any]:
    """The transforms in front of an index's lists: its rotation, where it has one."""
    chain: Any = index.chain if isinstance(index, faiss.IndexPreTransform) else None
    return [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())] if chain else []


def rotate(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Apply the index's rotation to vectors. Equal to faiss's result but for a sum's rounding."""
    for rotation in transforms_of(index):
        assert not rotation.have_bias, "a rotation"
        matrix = faiss.vector_to_array(rotation.A).reshape(rotation.d_out, rotation.d_in)
        vectors = Rotation(as_tensor(matrix.T))(as_tensor(vectors)).numpy()
    return np.ascontiguousarray(vectors)


def error_stride(count: int) -> slice:
    """A stride that takes about ERROR_VECTORS of `count` vectors, for estimating the quantization error."""
    return slice(None, None, max(1, count // ERROR_VECTORS))


def quantization_error(errors: np.ndarray) -> float:
    """The error relative to the vectors' squares, from sums of `Coder.errors`: 0 at best, about 1 for useless centroids."""
    return float(errors[0] / errors[1]) if errors[1] else 0.0


class Coder:
    """A trained index as a function of vectors."""

    def __init__(self, kind: IndexKind, index: Any) -> None:
        self._kind, self._index = kind, index
        self._lists: FaissIvf | None = lists_of(index) if kind.has_lists else None
        self._nearest: Nearest | None = None

    def encode(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists of vectors, int64 [n], zeros where the kind has none; and codes, uint8 [n, code]. vectors: float32 [n, dim]."""
        points = rotate(self._index, vectors)
        lists = self._lists_of(self._lists, points) if self._lists is not None else np.zeros(len(points), np.int64)
        return lists, self._kind.codes(self._lists, points, lists)

    def errors(self, vectors: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """float64 [2]: the sum of the squared distances of vectors from the centroids of their lists, and the sum of their squares;
        zeros for a kind without lists. lists: int64 [n], from `encode`."""
        if self._lists is None or not len(vectors):
            return np.zeros(2)
        points = rotate(self._index, vectors)
        near = centroids_of(self._lists)[lists]
        return np.array([np.sum((points - near) ** 2, dtype=np.float64), np.sum(points**2, dtype=np.float64)])

    def _lists_of(self, inner: FaissIvf, points: np.ndarray) -> np.ndarray:
        """int64 [n]. The search for the nearest centroid is prepared once, for vectors like those of the first batch."""
        if self._nearest is None and len(points):
            self._nearest = nearest_of(inner.quantizer, points)
        return self._nearest(points) if self._nearest else np.zeros(0, np.int64)


def nearest_of(quantizer: Any, sample: np.ndarray) -> Nearest:
    """A function of vectors to their nearest centroids, int64 [n]: exact, or by the graph where the quantizer is one.

    sample: vectors, float32 [n, dim], like those to come; they decide which of two exact ways is the quicker.
    """
    quantizer = faiss.downcast_index(quantizer)
    if isinstance(quantizer, faiss.IndexFlat):
        from .nearest_centroid import Centroids  # loads torch, which the driver does without

        inner_product = quantizer.metric_type == faiss.METRIC_INNER_PRODUCT
        return Centroids.for_vectors(quantizer.reconstruct_n(0, quantizer.ntotal), inner_product, sample).nearest
    return lambda vectors: np.ascontiguousarray(quantizer.search(vectors, 1)[1][:, 0])


def fill(kind: IndexKind, index: Any, numbers: np.ndarray, lists: np.ndarray, codes: np.ndarray) -> None:
    """Add encoded vectors to an index. numbers: their ids in faiss, int64 [n]. lists, codes: as `Coder.encode` returns them."""
    if not kind.has_lists:
        index.add_with_ids(np.ascontiguousarray(codes).view(np.float32), numbers)
        return
    inner = lists_of(index)
    order = np.argsort(lists, kind="stable")
    numbers, codes = np.ascontiguousarray(numbers[order]), np.ascontiguousarray(codes[order])
    filled, starts = np.unique(lists[order], return_index=True)
    for place, start, stop in zip(filled, starts, [*starts[1:], len(lists)], strict=True):
        entries = numbers[start:stop], codes[start:stop]
        inner.invlists.add_entries(int(place), int(stop - start), *map(faiss.swig_ptr, entries))
    inner.ntotal += len(numbers)
    index.ntotal = inner.ntotal


@dataclass(frozen=True)
class EncodeMapper(FusedMapper):
    """A shard of vectors -> rows with `id`, the kept columns, LIST, CODE and `error`.

    Facts of a part: `vectors`, and `error`, their quantization error.
    """

    source: VectorSource
    kind: IndexKind
    folder: Folder  # of TRAINED
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        compute_with(self.threads)
        coder = Coder(self.kind, load_index(self.folder.read(TRAINED)))

        def encode(shard: Shard) -> Result:
            tables, errors, count = [], np.zeros(2), 0
            for rows in self.source.batches(shard):
                vectors = rows.valid_vectors
                lists, codes = coder.encode(vectors)
                tables.append(_encoded(rows, lists, codes))
                checked = error_stride(len(vectors))
                errors += coder.errors(vectors[checked], lists[checked])
                count += len(vectors)
            table = pa.concat_tables(tables)
            counts = {"source_rows": len(table), "errors": len(table) - table["error"].null_count}
            return Result(table, counts, {"error": quantization_error(errors), "vectors": count})

        return encode


def _encoded(rows: VectorRows, lists: np.ndarray, codes: np.ndarray) -> pa.Table:
    """The rows with lists and codes, null in rows without a vector."""
    valid = rows.valid
    places = pa.array(np.cumsum(valid) - 1, mask=~valid)
    table = rows.table
    columns = {LIST: pa.array(lists.astype(np.int32)).take(places), CODE: binary_column(codes).take(places)}
    for name, values in (columns | {"error": rows.reasons}).items():
        table = table.append_column(name, values)
    return table

"""Encoding of the rows: each input row with its list and code, or with the reason that it has none."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ...data.shards import Shard
from ...engine.mapper import FusedMapper, Result
from ...storage.folder import Folder
from ..kinds import IndexKind
from .codec import Coder, error_stride, load_index, quantization_error
from .layout import CODE, LIST, TRAINED
from .stage_parts import binary_column
from .threads import compute_with
from .vector_source import VectorRows, VectorSource


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

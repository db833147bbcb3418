"""Every input row with its list and code, or the reason that it has none: the exactly-once part of a build."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..indexes import Kind
from ..plan import Shard
from ..stages import Bundle, Direct
from ..storage import Folder
from . import CODE, FACTS, LIST, TRAINED, VECTOR
from .centroids import compute_with
from .coding import Coder, load_index
from .reading import matrix
from .source import Source

ROWS_AT_ONCE = 16_384  # held turned, and less their centroids


@dataclass(frozen=True)
class Encode(Direct):
    """The verb. A part's rows are `id`, the carried columns, LIST, CODE and `error`; FACTS tells how well the centroids fit."""

    source: Source
    kind: Kind
    folder: Folder  # of TRAINED
    threads: int

    def prepare(self, shard: Shard) -> tuple[Bundle, dict[str, float]]:
        began = time.perf_counter()
        rows = self.source.read(shard)
        vectors = rows.vectors if rows.good.all() else rows.vectors[rows.good]  # no copy where all have one
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.source.dim)
        table = rows.table.append_column("error", rows.reasons)
        return {"rows": table, "vectors": pa.table({VECTOR: column})}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Bundle], Bundle]:
        compute_with(self.threads)
        coder = Coder(self.kind, load_index(self.folder.read(TRAINED)))

        def work(bundle: Bundle) -> Bundle:
            vectors = matrix(bundle["vectors"][VECTOR])
            pieces = [vectors[start : start + ROWS_AT_ONCE] for start in range(0, max(len(vectors), 1), ROWS_AT_ONCE)]
            made = [coder.encode(piece) for piece in pieces]
            lists, codes = (np.concatenate(each) for each in zip(*made, strict=True))
            data = {LIST: pa.array(lists.astype(np.int32)), CODE: _binary(codes)}
            facts = {"error": coder.error(vectors), "vectors": len(vectors)}
            codes_table = pa.table(data).replace_schema_metadata({FACTS: json.dumps(facts)})
            return {"rows": bundle["rows"], "codes": codes_table}

        return work

    def finish(self, shard: Shard, bundle: Bundle) -> tuple[pa.Table, dict[str, int]]:
        rows, codes = bundle["rows"], bundle["codes"]
        good = pc.is_null(rows["error"]).combine_chunks()
        places = pc.if_else(good, pc.subtract(pc.cumulative_sum(good.cast(pa.int64())), 1), pa.scalar(None, pa.int64()))
        table = rows.drop_columns(["error"])
        for name in (LIST, CODE):
            table = table.append_column(name, codes[name].combine_chunks().take(places))
        table = table.append_column("error", rows["error"]).replace_schema_metadata(codes.schema.metadata)
        errors = table.num_rows - rows["error"].null_count
        return table, {"rows": table.num_rows, "source_rows": table.num_rows, "errors": errors}


def _binary(codes: np.ndarray) -> pa.Array:
    """uint8 [n, code] as fixed-size binary, not copied."""
    codes = np.ascontiguousarray(codes)
    return pa.Array.from_buffers(pa.binary(codes.shape[1]), len(codes), [None, pa.py_buffer(codes)])

"""Every input row with its list and code, or the reason that it has none: the exactly-once part of a build."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ...data.shards import Shard
from ...engine.mapper import Tables
from ...storage.folder import Folder
from ..kinds import IndexKind
from .codec import Coder, error_stride, load_index, quantization_error
from .layout import CODE, FACTS, LIST, TRAINED
from .stage_parts import PATHS, OfParts, column, shard_of
from .threads import compute_with
from .vector_source import Rows, Source


@dataclass(frozen=True)
class EncodeMapper(OfParts):
    """The verb. A part's rows are `id`, the carried columns, LIST, CODE and `error`; FACTS tells how well the centroids fit."""

    source: Source
    kind: IndexKind
    folder: Folder  # of TRAINED
    threads: int

    def worker(self) -> Callable[[Tables], Tables]:
        compute_with(self.threads)
        coder = Coder(self.kind, load_index(self.folder.read(TRAINED)))

        def work(bundle: Tables) -> Tables:
            tables, errors, count = [], np.zeros(2), 0
            for rows in self.source.batches(shard_of(bundle[PATHS])):
                vectors = rows.vectors if rows.good.all() else rows.vectors[rows.good]  # no copy where all have one
                lists, codes = coder.encode(vectors)
                tables.append(_coded(rows, lists, codes))
                some = error_stride(len(vectors))
                errors += coder.errors(vectors[some], lists[some])
                count += len(vectors)
            facts = json.dumps({"error": quantization_error(errors), "vectors": count})
            return {"rows": pa.concat_tables(tables).replace_schema_metadata({FACTS: facts})}

        return work

    def finish(self, shard: Shard, bundle: Tables) -> tuple[pa.Table, dict[str, int]]:
        table, counts = super().finish(shard, bundle)
        return table, counts | {"source_rows": table.num_rows, "errors": table.num_rows - table["error"].null_count}


def _coded(rows: Rows, lists: np.ndarray, codes: np.ndarray) -> pa.Table:
    """The rows with lists and codes, which only the good ones have."""
    places = pa.array(np.cumsum(rows.good) - 1, mask=~rows.good)
    found = {
        LIST: pa.array(lists.astype(np.int32)).take(places),
        CODE: column(codes).take(places),
        "error": rows.reasons,
    }
    table = rows.table
    for name, values in found.items():
        table = table.append_column(name, values)
    return table

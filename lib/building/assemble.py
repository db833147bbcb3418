"""Encoded rows become plain faiss files: pieces of some of the rows each, and, where asked for, pieces merged on disk.

A piece is published before the part that tells of it. Its name says which rows it holds, so a piece that is made again is
the same one.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..indexes import Kind
from ..parts import Part
from ..plan import Shard
from ..stages import Bundle
from ..storage import Folder, download
from . import CODE, FACTS, LIST, TRAINED
from .coding import fill, load_index
from .reading import PATHS, paths_of, read_parts

PIECE_BYTES = 1 << 30  # of codes in a piece; the worker that fills it holds up to twice as much
DATA = ".ivfdata"


def grouped(parts: Sequence[Part], row_bytes: float, overhead: int) -> list[list[Part]]:
    """Parts in order, in groups that make a piece each. overhead: bytes of centroids, which every piece repeats."""
    most = max(PIECE_BYTES, 2 * overhead)
    groups: list[list[Part]] = []
    held = 0.0
    for part in parts:
        size = (part.rows - part.errors) * row_bytes
        if not groups or held + size > most:
            groups.append([])
            held = 0.0
        groups[-1].append(part)
        held += size
    return groups


@dataclass(frozen=True)
class Assemble:
    """The verb: a faiss file of each shard's parts. firsts: the number of each shard's first row."""

    kind: Kind
    folder: Folder  # of the build
    pieces: Folder
    names: tuple[str, ...]
    firsts: tuple[int, ...]
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Bundle, dict[str, float]]:
        facts = json.dumps({"name": self.names[shard.number], "first": self.firsts[shard.number]})
        return {PATHS: paths_of(shard).replace_schema_metadata({FACTS: facts})}, {}

    def worker(self) -> Callable[[Bundle], Bundle]:
        import faiss

        faiss.omp_set_num_threads(self.threads if self.kind.lists else 1)
        trained = self.folder.read(TRAINED)

        def work(bundle: Bundle) -> Bundle:
            began = time.perf_counter()
            facts = json.loads(bundle[PATHS].schema.metadata[FACTS])
            index, number = load_index(trained), facts["first"]
            for table in read_parts(bundle[PATHS], [LIST, CODE], self.storage):
                number += _add(self.kind, index, table, number)
            index = self.kind.finished(index)
            said = {"first": facts["first"], "rows": number - facts["first"], "vectors": index.ntotal}
            files = _published(self.pieces, {facts["name"]: lambda path: faiss.write_index(index, path)})
            return _told(said | files[0] | {"seconds": time.perf_counter() - began})

        return work

    def finish(self, shard: Shard, bundle: Bundle) -> tuple[pa.Table, dict[str, int]]:
        return bundle["rows"], {"rows": 1, "source_rows": shard.rows}


def _add(kind: Kind, index: Any, table: pa.Table, number: int) -> int:
    """Fill a part's rows in, the first of which is `number`; how many rows it has, the ones without a vector counted."""
    good = pc.is_valid(table[LIST]).combine_chunks()
    numbers = number + np.flatnonzero(good.to_numpy(zero_copy_only=False))
    held = table.filter(good).combine_chunks()
    if len(held):
        codes = held[CODE].combine_chunks()
        size = codes.type.byte_width
        flat = np.frombuffer(codes.buffers()[1], np.uint8)[codes.offset * size : (codes.offset + len(codes)) * size]
        fill(kind, index, numbers, held[LIST].to_numpy().astype(np.int64), flat.reshape(-1, size))
    return len(table)


@dataclass(frozen=True)
class Merge:
    """The verb: the pieces of a shard as one index whose lists lie on disk; two files, `name` and `name`.ivfdata.

    Neither vectors nor codes are held in memory: faiss maps the pieces and copies list by list.
    """

    folder: Folder  # of the build
    merged: Folder
    names: tuple[str, ...]
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Bundle, dict[str, float]]:
        facts = json.dumps({"name": self.names[shard.number]})
        return {PATHS: paths_of(shard).replace_schema_metadata({FACTS: facts})}, {}

    def worker(self) -> Callable[[Bundle], Bundle]:
        return self._work

    def _work(self, bundle: Bundle) -> Bundle:
        import faiss
        from faiss.contrib.ondisk import merge_ondisk

        began = time.perf_counter()
        name = json.loads(bundle[PATHS].schema.metadata[FACTS])["name"]
        index = load_index(self.folder.read(TRAINED))
        with tempfile.TemporaryDirectory(prefix="shoal-merge-") as place:
            pieces = [
                download(path, f"{place}/{number}", self.storage)
                for number, path in enumerate(bundle[PATHS]["path"].to_pylist())
            ]
            data = f"{place}/{Path(name).stem}{DATA}"
            merge_ondisk(index, pieces, data)
            # The index names its lists' file, which readers seek beside it (IO_FLAG_ONDISK_SAME_DIR).
            made: dict[str, Callable[[str], object]] = {
                os.path.basename(data): lambda path: os.rename(data, path),
                name: lambda path: faiss.write_index(index, path),
            }
            files = _published(self.merged, made)
        said = {"vectors": index.ntotal, "name": name, "files": files, "seconds": time.perf_counter() - began}
        return _told(said)

    def finish(self, shard: Shard, bundle: Bundle) -> tuple[pa.Table, dict[str, int]]:
        return bundle["rows"], {"rows": 1, "source_rows": shard.rows}


def _published(folder: Folder, files: Mapping[str, Callable[[str], object]]) -> list[dict[str, Any]]:
    """Write each file on this machine's disk and put it under its name; names, sizes and checksums."""
    told = []
    with tempfile.TemporaryDirectory(prefix="shoal-index-") as place:
        for name, write in files.items():
            path = f"{place}/{name}"
            write(path)
            told.append({"name": name, "bytes": os.path.getsize(path), "sha256": folder.put(name, path)})
            os.unlink(path)
    return told


def _told(facts: Mapping[str, Any]) -> Bundle:
    return {"rows": pa.table({"name": [facts["name"]]}).replace_schema_metadata({FACTS: json.dumps(facts)})}

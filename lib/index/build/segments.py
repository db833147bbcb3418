"""Encoded rows become plain faiss files: pieces of some of the rows each, and, where asked for, pieces merged on disk.

A piece is published before the part that tells of it. Its name says which rows it holds, so a piece that is made again is
the same one.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import as_one_array
from ...data.shards import Shard
from ...engine.mapper import Tables
from ...engine.parts import Part
from ...storage.filesystem import download
from ...storage.folder import Folder
from ...storage.scratch import Scratch
from ..kinds import IndexKind, lists_of
from .codec import fill, load_index, open_merged, open_piece
from .layout import CODE, FACTS, LIST, TRAINED
from .stage_parts import PATHS, OfParts, matrix, paths_of, read_parts

SEGMENT_BYTES = 512 << 20  # of codes, about; the worker that fills a segment holds up to twice as much
CENTROID_MULTIPLE = 2  # a segment has at least so many times the bytes of the centroids, which each segment repeats
FILL_BYTES = 64 << 20  # of codes at once: each list that they go to costs a call
LIST_BYTES = 24  # of a list in a mapped piece: its length, its room, its place
DATA = ".ivfdata"


def segments_for(codes: float, repeated: float, merged: int = 1) -> int:
    """Return the number of segments that `codes` bytes of codes are split into.

    repeated: bytes of the empty index, which every segment repeats. merged: the number of merged indexes, each of which
    takes equally many segments.
    """
    count = max(1, math.ceil(codes / max(SEGMENT_BYTES, CENTROID_MULTIPLE * repeated)))
    return -(-count // merged) * merged


def grouped(parts: Sequence[Part], row_bytes: float, overhead: int, merged: int = 1) -> list[list[Part]]:
    """Parts in order, in groups of about equal size that make a piece each. overhead: bytes of the centroids. merged: indexes that
    are made of them, of as many pieces each where there are parts enough."""
    ends = np.cumsum([(part.rows - part.errors) * row_bytes for part in parts])
    count = segments_for(ends[-1], overhead, merged)
    places = np.ceil(ends * count / max(ends[-1], 1)).clip(1, count).tolist()
    return [[part for part, _ in group] for _, group in groupby(zip(parts, places, strict=True), key=itemgetter(1))]


@dataclass(frozen=True)
class BuildSegment(OfParts):
    """The verb: a faiss file of each shard's parts. firsts: the number of each shard's first row."""

    kind: IndexKind
    folder: Folder  # of the build
    pieces: Folder
    names: tuple[str, ...]
    firsts: tuple[int, ...]
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        facts = json.dumps({"name": self.names[shard.number], "first": self.firsts[shard.number]})
        return {PATHS: paths_of(shard).replace_schema_metadata({FACTS: facts})}, {}

    def worker(self) -> Callable[[Tables], Tables]:
        import faiss

        faiss.omp_set_num_threads(self.threads if self.kind.has_lists else 1)
        trained = self.folder.read(TRAINED)

        def work(bundle: Tables) -> Tables:
            began = time.perf_counter()
            facts = json.loads(bundle[PATHS].schema.metadata[FACTS])
            index, number = load_index(trained), facts["first"]
            for table in _several(read_parts(bundle[PATHS], [LIST, CODE], self.storage)):
                number += _add(self.kind, index, table, number)
            index = self.kind.finished(index)
            said = {"first": facts["first"], "rows": number - facts["first"], "vectors": index.ntotal}
            with Scratch("index") as place:
                faiss.write_index(index, f"{place}/{facts['name']}")
                said |= _put(self.pieces, place, facts["name"])
            return _told(said | {"seconds": time.perf_counter() - began})

        return work


def _several(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Parts together, in order, until they are FILL_BYTES."""
    held: list[pa.Table] = []
    for part in parts:
        held.append(part)
        if sum(each.nbytes for each in held) >= FILL_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _add(kind: IndexKind, index: Any, table: pa.Table, number: int) -> int:
    """Fill rows in, the first of which is `number`; how many rows it has, the ones without a vector counted."""
    good = as_one_array(pc.is_valid(table[LIST]))
    numbers = number + np.flatnonzero(good.to_numpy(zero_copy_only=False))
    held = table.filter(good) if len(numbers) < len(table) else table
    if len(held):
        fill(kind, index, numbers, held[LIST].to_numpy().astype(np.int64), matrix(held[CODE], np.uint8))
    return len(table)


@dataclass(frozen=True)
class MergeSegments(OfParts):
    """The verb: the pieces of a shard as one index whose lists lie on disk; two files, `name` and `name`.ivfdata.

    Neither vectors nor codes are held in memory: faiss maps the pieces and copies list by list. Of each piece it holds where its
    lists are, LIST_BYTES each.
    """

    folder: Folder  # of the build
    merged: Folder
    names: tuple[str, ...]
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        facts = json.dumps({"name": self.names[shard.number]})
        return {PATHS: paths_of(shard).replace_schema_metadata({FACTS: facts})}, {}

    def worker(self) -> Callable[[Tables], Tables]:
        return self._work

    def _work(self, bundle: Tables) -> Tables:
        import faiss

        began = time.perf_counter()
        name = json.loads(bundle[PATHS].schema.metadata[FACTS])["name"]
        index = load_index(self.folder.read(TRAINED))
        with Scratch("merge") as place:
            pieces = [
                download(path, f"{place}/{number}", self.storage)
                for number, path in enumerate(bundle[PATHS]["path"].to_pylist())
            ]
            data = f"{Path(name).stem}{DATA}"
            _merge(index, pieces, place, data)
            faiss.write_index(index, f"{place}/{name}")
            vectors = open_merged(f"{place}/{name}").ntotal
            if vectors != index.ntotal:
                raise RuntimeError(f"{name} has {vectors} vectors where {index.ntotal} were merged")
            files = [_put(self.merged, place, each) for each in (data, name)]  # the index last: it names the other
        return _told({"name": name, "vectors": vectors, "files": files, "seconds": time.perf_counter() - began})


def _merge(index: Any, pieces: Sequence[str], place: str, data: str) -> None:
    """Give an empty index the lists of all pieces, in the file `data` of the folder `place`.

    faiss.contrib.ondisk.merge_ondisk does the same, but keeps every piece open for the life of the process.
    """
    import faiss

    opened, inner = [_without_centroids(path) for path in pieces], lists_of(index)
    pointers = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
    for piece in opened:
        pointers.push_back(piece.invlists)
    lists: Any = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, f"{place}/{data}")
    index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    inner.replace_invlists(lists, True)
    lists.this.disown()
    lists.filename = data  # which readers seek beside the index; faiss would keep this folder's name


def _without_centroids(path: str) -> Any:
    """An index of a piece's lists alone, which come as pages of its file: every piece repeats the centroids, and they are large.

    Only another index can take lists over and free them in the end: as Python's own they end faiss's bindings.
    """
    import faiss

    piece = lists_of(open_piece(path))
    owner = faiss.IndexIVFFlat(faiss.IndexFlatL2(1), 1, piece.nlist)
    owner.code_size = piece.code_size
    piece.own_invlists = False
    owner.replace_invlists(piece.invlists, True)
    return owner


def _put(folder: Folder, place: str, name: str) -> dict[str, Any]:
    """Publish a file of this machine's folder `place`; its name, size and checksum."""
    return {"name": name, "bytes": os.path.getsize(f"{place}/{name}"), "sha256": folder.put(name, f"{place}/{name}")}


def _told(facts: Mapping[str, Any]) -> Tables:
    return {"rows": pa.table({"name": [facts["name"]]}).replace_schema_metadata({FACTS: json.dumps(facts)})}

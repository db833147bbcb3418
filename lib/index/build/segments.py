"""Segments: plain faiss files of some of the encoded rows each, and segments merged on disk.

A segment is published before the part that names it. Its name depends only on its rows, so a segment that is built again is the
same file.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import as_one_array
from ...data.shards import Shard
from ...data.vectors import as_matrix
from ...engine.mapper import FusedMapper, Result
from ...engine.parts import Part
from ...storage.filesystem import download
from ...storage.folder import Folder
from ...storage.scratch import Scratch
from ..kinds import IndexKind, lists_of
from .codec import fill, load_index, open_merged, open_segment
from .layout import CODE, LIST, TRAINED
from .stage_parts import group_neighbours, read_parts

SEGMENT_BYTES = 512 << 20  # of codes, about; the worker that fills a segment holds up to twice as much
CENTROID_MULTIPLE = 2  # a segment has at least so many times the bytes of the centroids, which each segment repeats
FILL_BYTES = 64 << 20  # of codes at once: each list that they go to costs a call
LIST_BYTES = 24  # of a list in a mapped segment: its length, its capacity, its position
DATA = ".ivfdata"  # ending of the file with the lists of a merged index


def segments_for(codes: float, repeated: float, merged: int = 1) -> int:
    """Return the number of segments that `codes` bytes of codes are split into.

    repeated: bytes of the empty index, which every segment repeats. merged: the number of merged indexes, each of which
    takes equally many segments.
    """
    count = max(1, math.ceil(codes / max(SEGMENT_BYTES, CENTROID_MULTIPLE * repeated)))
    return -(-count // merged) * merged


def group_parts(parts: Sequence[Part], row_bytes: float, overhead: int, merged: int = 1) -> list[list[Part]]:
    """Group parts, in order, into segments of about equal size.

    overhead: bytes of the empty index. merged: number of indexes that the segments are merged into; each takes equally many
    segments if there are parts enough.
    """
    ends = np.cumsum([(part.rows - part.errors) * row_bytes for part in parts])
    count = segments_for(ends[-1], overhead, merged)
    return group_neighbours(parts, np.ceil(ends * count / max(ends[-1], 1)).clip(1, count))


def segment_memory(codes: float, trained: float) -> float:
    """Memory to fill a segment: its codes, and the empty index as bytes and as faiss has it."""
    return codes + 2 * trained


def merge_memory(trained: float, lists: int, segments: int) -> float:
    """Memory to merge so many segments of so many lists."""
    return 2 * trained + LIST_BYTES * lists * segments


@dataclass(frozen=True)
class BuildSegment(FusedMapper):
    """Some parts of encoded rows -> a segment.

    names, firsts: by shard, the name of its segment and the number of its first row. Facts: all that the manifest says of it.
    """

    kind: IndexKind
    folder: Folder  # of the build
    segments: Folder
    names: tuple[str, ...]
    firsts: tuple[int, ...]
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        faiss.omp_set_num_threads(self.threads if self.kind.has_lists else 1)
        trained = self.folder.read(TRAINED)

        def build(shard: Shard) -> Result:
            began = time.perf_counter()
            name, first = self.names[shard.number], self.firsts[shard.number]
            index, number = load_index(trained), first
            parts = read_parts([each.path for each in shard.ranges], [LIST, CODE], self.folder.options)
            for table in _batched(parts):
                number += _add(self.kind, index, table, number)
            index = self.kind.finalize(index)
            facts = {"first": first, "rows": number - first, "vectors": index.ntotal}
            with Scratch("index") as scratch:
                faiss.write_index(index, f"{scratch}/{name}")
                facts |= _put(self.segments, scratch, name)
            return _named(facts | {"seconds": time.perf_counter() - began})

        return build


def _batched(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Parts joined, in order, to tables of at least FILL_BYTES."""
    waiting: list[pa.Table] = []
    for part in parts:
        waiting.append(part)
        if sum(each.nbytes for each in waiting) >= FILL_BYTES:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _add(kind: IndexKind, index: Any, table: pa.Table, number: int) -> int:
    """Add rows to an index; the number of rows, including those without a vector. number: of the first row."""
    valid = as_one_array(pc.is_valid(table[LIST]))
    numbers = number + np.flatnonzero(valid.to_numpy(zero_copy_only=False))
    rows = table.filter(valid) if len(numbers) < len(table) else table
    if len(rows):
        fill(kind, index, numbers, rows[LIST].to_numpy().astype(np.int64), as_matrix(rows[CODE], np.uint8))
    return len(table)


@dataclass(frozen=True)
class MergeSegments(FusedMapper):
    """Some segments -> one index with its lists on disk, in two files: NAME.faiss and NAME.ivfdata.

    Neither vectors nor codes are in memory: faiss maps the segments and copies list by list. Of each segment it keeps LIST_BYTES a
    list in memory. names: by shard, of the merged index.
    """

    folder: Folder  # of the build
    merged: Folder
    names: tuple[str, ...]

    def load(self) -> Callable[[Shard], Result]:
        return self._merge

    def _merge(self, shard: Shard) -> Result:
        began, name = time.perf_counter(), self.names[shard.number]
        index = load_index(self.folder.read(TRAINED))
        with Scratch("merge") as scratch:
            storage, places = self.folder.options, enumerate(shard.ranges)
            segments = [download(each.path, f"{scratch}/{number}", storage) for number, each in places]
            data = f"{Path(name).stem}{DATA}"
            merge_on_disk(index, segments, scratch, data)
            faiss.write_index(index, f"{scratch}/{name}")
            vectors = open_merged(f"{scratch}/{name}").ntotal
            if vectors != index.ntotal:
                raise RuntimeError(f"{name} has {vectors} vectors where {index.ntotal} were merged")
            files = [_put(self.merged, scratch, each) for each in (data, name)]  # the index last: it names the other
        return _named({"name": name, "vectors": vectors, "files": files, "seconds": time.perf_counter() - began})


def merge_on_disk(index: Any, segments: Sequence[str], folder: str, data: str) -> None:
    """Give an empty index the lists of all segments, in the file `data` of a local folder.

    faiss.contrib.ondisk.merge_ondisk does the same, but keeps every segment open for the life of the process.
    """
    opened, inner = [_without_centroids(path) for path in segments], lists_of(index)
    pointers = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
    for segment in opened:
        pointers.push_back(segment.invlists)
    lists: Any = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, f"{folder}/{data}")
    index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    inner.replace_invlists(lists, True)
    lists.this.disown()
    lists.filename = data  # readers look for it beside the index; faiss would keep this folder's name


def _without_centroids(path: str) -> Any:
    """An index with the lists of a segment, mapped from its file, and without its centroids: every segment repeats these, and they
    are large.

    Only another index can own the lists and free them in the end: owned by Python they crash faiss's bindings.
    """
    segment = lists_of(open_segment(path))
    owner = faiss.IndexIVFFlat(faiss.IndexFlatL2(1), 1, segment.nlist)
    owner.code_size = segment.code_size
    segment.own_invlists = False
    owner.replace_invlists(segment.invlists, True)
    return owner


def _put(folder: Folder, scratch: str, name: str) -> dict[str, Any]:
    """Publish a file of a local folder; its name, size and checksum."""
    return {
        "name": name,
        "bytes": os.path.getsize(f"{scratch}/{name}"),
        "sha256": folder.put(name, f"{scratch}/{name}"),
    }


def _named(facts: Mapping[str, Any]) -> Result:
    """A part of one row, the name of a file, with facts of it."""
    return Result(pa.table({"name": [facts["name"]]}), facts=facts)

"""Segments as a worker opens them: the faiss index, the ids of its rows, and the rows that a search may return."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...engine.parts import read_manifest
from ...errors import InputError
from ...storage.filesystem import download
from ...storage.folder import Folder
from ...storage.listing import current_tag
from ...storage.scratch import Scratch
from ..build.codec import open_segment
from ..build.stage_parts import ids_of


@dataclass(frozen=True)
class Segment:
    """An opened segment.

    first: the number of its first row in the index. ids: of each row, also of rows without a vector. selector: faiss's selector of
    the rows that a search may return; None for all.
    """

    index: Any
    first: int
    ids: pa.Array
    selector: Any


class SegmentReader:
    """Opens segments in a worker. It keeps the last one open, since the worker's next shard mostly has the same segment.

    ranges: by a segment's name, the number of its first row and its rows. rows: folder of the encoded rows, which have the ids.
    allowed: the ids that a search may return; None for all.
    """

    def __init__(self, ranges: Mapping[str, tuple[int, int]], rows: Folder, allowed: pa.Array | None):
        self.ranges, self.rows, self.allowed = ranges, rows, allowed
        self.parts = read_manifest(rows)
        self.scratch = Scratch("search")
        self.path = ""
        self.segment: Segment | None = None

    def open(self, path: str) -> Segment:
        """Raises InputError for a file of the index that this node does not have."""
        if self.segment is not None and path == self.path:
            return self.segment
        self.segment = None  # frees the memory of the one before
        self.path, self.segment = path, self._open(path)
        return self.segment

    def _open(self, path: str) -> Segment:
        storage = self.rows.options
        first, count = self.ranges[path.rpartition("/")[2]]
        with _named_when_missing(path):
            current_tag(path, storage)  # faiss's own error would not name the cause
            index = open_segment(download(path, f"{self.scratch.name}/segment", storage))
        with _named_when_missing(self.rows.url):
            ids = self._ids(first, count)
        selector = None
        if self.allowed is not None:
            places = np.flatnonzero(pc.is_in(ids, value_set=self.allowed).to_numpy(zero_copy_only=False))
            selector = faiss.IDSelectorBatch(places + first)
        return Segment(index, first, ids, selector)

    def _ids(self, first: int, count: int) -> pa.Array:
        parts, start = [], 0
        for part in self.parts:
            if start < first + count and start + part.rows > first:
                parts.append(part)
            start += part.rows
        return ids_of(self.rows, parts)


@contextmanager
def _named_when_missing(url: str) -> Iterator[None]:
    """Raises InputError for a file of the index that is not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename or url} is not there on the node {gethostname()}: start the command again that builds the index; or, "
            "where nodes do not share a file system, put the index into an object store"
        ) from error

"""Centroids and codec from the sample: the empty index, which every later stage reads and none changes.

Up to FLAT_LISTS centroids come from one k-means, on one worker with all CPUs of its node. More come in two levels, as maps over
shards: k-means of a part of the sample gives cells, the sample is partitioned by cell, and k-means in each cell gives as many
centroids as its share of the sample.
"""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import read_rows
from ...data.shards import Shard
from ...data.vectors import as_matrix
from ...engine.mapper import FusedMapper, Result
from ...storage.folder import Folder
from ..kinds import IndexKind, Metric, centroids_of, empty_index, lists_of, uses_inner_product
from .codec import Coder, error_stride, load_index, nearest_of, quantization_error, rotate, save_index, transforms_of
from .kmeans import COPIED, kmeans
from .layout import HELD_OUT, TRAINED, VECTOR
from .stage_parts import binary_column, read_parts, read_training_vectors
from .threads import compute_with

POINTS = 50  # of the sample for a centroid; faiss wants 39 at least
MIN_POINTS = 39
MIN_CODEC_ROWS = 256  # vectors to train a product quantizer's codebook of 256 entries
CELL_POINTS = 256  # of the sample for a cell
CODEC_ROWS = 65_536  # vectors of the sample that train the rotation and the codec, at most
PARTITION_BYTES = 512 << 20  # of the sample's vectors in a shard of partitioning, which adds a range to each cell
CODEC_COPIES = 3  # of the vectors that train the codec: as sampled, rotated, and less the centroids
CELLS = "cells.npy"


@dataclass(frozen=True)
class TrainPlan:
    """The index to train: its kind, and its number of lists."""

    kind: IndexKind
    dim: int
    lists: int
    metric: Metric

    @property
    def inner_product(self) -> bool:
        return uses_inner_product(self.kind, self.metric)

    def empty(self) -> Any:
        return empty_index(self.kind, self.dim, self.lists, self.metric)


@dataclass(frozen=True)
class TrainMapper(FusedMapper):
    """The whole sample, one shard -> TRAINED, and a part of one row.

    centroids: the parts with the centroids, where two levels made them. Facts: `seconds`, `rows` of the sample, and `error`, the
    quantization error of some of them.
    """

    plan: TrainPlan
    folder: Folder
    threads: int
    centroids: tuple[str, ...] = ()

    def load(self) -> Callable[[Shard], Result]:
        compute_with(self.threads)
        return self._train

    def _train(self, shard: Shard) -> Result:
        began = time.perf_counter()
        sample = read_training_vectors(shard.ranges, self.plan.dim, self.folder.options)
        fit = sample[np.linspace(0, len(sample) - 1, min(len(sample), CODEC_ROWS)).astype(np.int64)]
        if not self.folder.exists(TRAINED):  # else a worker died after publishing it, before its part
            self.folder.claim(TRAINED, save_index(self._trained_index(sample, fit)))
        coder = Coder(self.plan.kind, load_index(self.folder.read(TRAINED)))
        checked = fit[error_stride(len(fit))]
        error = quantization_error(coder.errors(checked, coder.encode(checked)[0]))
        facts = {"seconds": time.perf_counter() - began, "rows": len(sample), "error": error}
        return Result(pa.table({"trained": [TRAINED]}), facts=facts)

    def _trained_index(self, sample: np.ndarray, fit: np.ndarray) -> Any:
        """The index: its centroids from the whole sample, its rotation and codec from `fit`, a part of it."""
        index = self.plan.empty()
        for transform in transforms_of(index):
            transform.train(fit)
        if self.plan.kind.has_lists:
            set_centroids(index, self._centroids(sample))
            train_codec(index, fit)
        else:
            index.train(fit)
        return index

    def _centroids(self, sample: np.ndarray) -> np.ndarray:
        if not self.centroids:
            return kmeans(sample, self.plan.lists, self.plan.inner_product)
        parts = read_parts(self.centroids, [VECTOR], self.folder.options)
        return np.concatenate([as_matrix(part[VECTOR], np.float32) for part in parts])


def set_centroids(index: Any, centroids: np.ndarray) -> None:
    """Put centroids ([lists, dim], of vectors that are not rotated) into an index whose lists have none yet.

    A rotation keeps distances, so k-means runs before it and its centroids are rotated.
    """
    centroids = rotate(index, centroids)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # the links of a graph that several threads build depend on their order
    faiss.downcast_index(lists_of(index).quantizer).add(centroids)
    faiss.omp_set_num_threads(threads)


def train_codec(index: Any, fit: np.ndarray) -> None:
    """Train the codec as faiss's `train` does once lists have centroids, in a quarter of the time.

    Here `Centroids` searches the nearest centroids, and where there are too many vectors evenly spaced ones are taken.
    """
    inner = lists_of(index)
    if isinstance(inner, faiss.IndexIVFFlat | faiss.IndexIVFRaBitQ):  # their codes depend on the centroids alone
        inner.is_trained = index.is_trained = True
        return
    points = rotate(index, fit)
    if 0 < (most := inner.train_encoder_num_vectors()) < len(points):
        points = points[np.linspace(0, len(points) - 1, most).astype(np.int64)]
    lists = None
    if inner.by_residual:
        owners = nearest_of(inner.quantizer, points)(points)
        points, lists = points - centroids_of(inner)[owners], faiss.swig_ptr(owners)
    inner.train_encoder(len(points), faiss.swig_ptr(points), lists)
    inner.is_trained = index.is_trained = True


@dataclass(frozen=True)
class TrainCells(FusedMapper):
    """A part of the sample, one shard -> the cells of the first level, published as CELLS, float32 [cells, dim]."""

    plan: TrainPlan
    cells: int
    folder: Folder
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        compute_with(self.threads)
        return self._train

    def _train(self, shard: Shard) -> Result:
        sample = read_training_vectors(shard.ranges, self.plan.dim, self.folder.options)
        sink = io.BytesIO()
        np.save(sink, kmeans(sample, self.cells, self.plan.inner_product))
        self.folder.claim(CELLS, sink.getvalue())
        return Result(pa.table({"cells": [self.cells]}))


@dataclass(frozen=True)
class PartitionByCell(FusedMapper):
    """Some parts of the sample -> their training vectors in the order of their cells, a row group a cell."""

    plan: TrainPlan
    folder: Folder  # of CELLS
    threads: int

    def load(self) -> Callable[[Shard], Result]:
        from .nearest_centroid import Centroids

        compute_with(self.threads)
        cells = np.load(io.BytesIO(self.folder.read(CELLS)))

        def partition(shard: Shard) -> Result:
            paths = [each.path for each in shard.ranges]
            table = pa.concat_tables(read_parts(paths, [VECTOR, HELD_OUT], self.folder.options))
            table = table.filter(pc.invert(table[HELD_OUT])).select([VECTOR]).combine_chunks()
            vectors = as_matrix(table[VECTOR], np.float32)
            owners = Centroids.for_vectors(cells, self.plan.inner_product, vectors).nearest(vectors)
            groups = np.bincount(owners, minlength=len(cells)).tolist()
            return Result(table.take(pa.array(np.argsort(owners, kind="stable"))), groups=groups)

        return partition


@dataclass(frozen=True)
class ClusterCell(FusedMapper):
    """The vectors of a cell -> its centroids. shares: their number, by shard."""

    plan: TrainPlan
    shares: tuple[int, ...]
    threads: int
    columns: pa.Schema
    storage: Mapping[str, Any] = field(repr=False)

    def load(self) -> Callable[[Shard], Result]:
        compute_with(self.threads)
        return self._cluster

    def _cluster(self, shard: Shard) -> Result:
        points = as_matrix(read_rows(shard, [VECTOR], self.columns, self.storage)[VECTOR], np.float32)
        share = self.shares[shard.number]
        centroids = kmeans(points, share, self.plan.inner_product) if share else points[:0]
        return Result(pa.table({VECTOR: binary_column(centroids)}))


@dataclass(frozen=True)
class TwoLevels:
    """The sizes of training in two levels. parts: of the sample. rows: of them, to train on."""

    lists: int
    dim: int
    parts: int
    rows: int

    @property
    def cells(self) -> int:
        return 2 ** round(self.lists.bit_length() / 2)

    @property
    def cells_stride(self) -> int:
        """One in so many parts trains the cells."""
        return max(1, self.rows // (self.cells * CELL_POINTS))

    @property
    def codec_stride(self) -> int:
        """One in so many parts trains the codec, when the centroids are trained."""
        return max(1, self.rows // CODEC_ROWS)

    @property
    def parts_a_shard(self) -> int:
        """Parts in a shard of partitioning by cell."""
        return max(1, PARTITION_BYTES * self.parts // max(self.rows * 4 * self.dim, 1))


def training_bytes(rows: float, dim: int) -> float:
    """Memory to train on so many vectors."""
    return 4 * dim * ((1 + COPIED) * rows + CODEC_COPIES * min(rows, CODEC_ROWS))


def shares(points: np.ndarray, lists: int) -> np.ndarray:
    """int64 [cells]: `lists` centroids over cells of so many points, in proportion, and no more than points."""
    ends = np.cumsum(points) * lists // max(int(points.sum()), 1)
    return np.minimum(np.diff(ends, prepend=0), points)

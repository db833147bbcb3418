"""Centroids and codec from the sample: the empty index, which every later stage reads and none changes.

Up to FLAT_LISTS centroids come of one k-means, on one worker with all of its node's cores. More come in two levels, as maps
over shards: a few cells by k-means of a part of the sample, the sample dealt by cell, and a k-means in each, whose number of
centroids is the cell's share of the sample.
"""

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import read_rows
from ...data.shards import Shard
from ...engine.mapper import Tables
from ...engine.parts import GROUPS
from ...storage.folder import Folder
from ..kinds import IndexKind, Metric, centroids_of, empty_index, lists_of, uses_inner_product
from .codec import Coder, error_stride, load_index, nearest_of, quantization_error, rotate, save_index, transforms_of
from .kmeans import kmeans
from .layout import FACTS, HELD, TRAINED, VECTOR
from .nearest_centroid import Centroids
from .stage_parts import PATHS, OfParts, column, matrix, read_parts, read_training_vectors
from .threads import compute_with

POINTS = 50  # of the sample for a centroid; faiss asks for 39 at least
LEAST_POINTS = 39
LEAST_CODEC = 256  # vectors a product quantizer's codebook of 256 is trained on, at the very least
CELL_POINTS = 256  # of the sample for a cell, of those there are
CODEC_ROWS = 65_536  # of the sample train what turns vectors, and, where that takes as many, the codec
DEALT_BYTES = 512 << 20  # of the sample's vectors that are dealt at once: a range is read of each for each cell
CELLS = "cells.npy"


@dataclass(frozen=True)
class TrainPlan:
    """What is trained: the kind, and how many lists it has."""

    kind: IndexKind
    dim: int
    lists: int
    metric: Metric

    @property
    def products(self) -> bool:
        return uses_inner_product(self.kind, self.metric)

    def empty(self) -> Any:
        return empty_index(self.kind, self.dim, self.lists, self.metric)


@dataclass(frozen=True)
class TrainMapper(OfParts):
    """The verb of the one shard that holds the whole sample: publishes TRAINED, and leaves a row that says how well it fits.

    centroids: where two levels made them, their parts.
    """

    plan: TrainPlan
    folder: Folder
    threads: int
    storage: Mapping[str, Any] = field(repr=False)
    centroids: tuple[str, ...] = ()

    def worker(self) -> Callable[[Tables], Tables]:
        compute_with(self.threads)

        def work(bundle: Tables) -> Tables:
            began = time.perf_counter()
            sample = read_training_vectors(bundle[PATHS], self.plan.dim, self.storage)
            fit = sample[np.linspace(0, len(sample) - 1, min(len(sample), CODEC_ROWS)).astype(np.int64)]
            if not self.folder.exists(TRAINED):  # as after a kill between this and the part that tells of it
                self.folder.claim(TRAINED, save_index(self._trained(sample, fit)))
            kept = Coder(self.plan.kind, load_index(self.folder.read(TRAINED)))
            few = fit[error_stride(len(fit))]
            error = quantization_error(kept.errors(few, kept.encode(few)[0]))
            facts = {"seconds": time.perf_counter() - began, "rows": len(sample), "error": error}
            return {"rows": pa.table({"trained": [TRAINED]}).replace_schema_metadata({FACTS: json.dumps(facts)})}

        return work

    def _trained(self, sample: np.ndarray, fit: np.ndarray) -> Any:
        """The index, its centroids of the whole sample, what turns vectors and the codec of a part of it."""
        index = self.plan.empty()
        for turn in transforms_of(index):
            turn.train(fit)
        if self.plan.kind.has_lists:
            give_centroids(index, self._given() if self.centroids else self._made(sample))
            train_codec(index, fit)
        else:
            index.train(fit)
        return index

    def _made(self, sample: np.ndarray) -> np.ndarray:
        return kmeans(sample, self.plan.lists, self.plan.products)

    def _given(self) -> np.ndarray:
        parts = read_parts(pa.table({"path": list(self.centroids)}), [VECTOR], self.storage)
        return np.concatenate([matrix(part[VECTOR]) for part in parts])


def give_centroids(index: Any, centroids: np.ndarray) -> None:
    """Put centroids ([lists, dim], of vectors as they come) into an index whose lists have none yet.

    What turns vectors keeps their distances, so it may turn what k-means has made of them.
    """
    import faiss

    centroids = rotate(index, centroids)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # the links of a graph made by several depend on who was first
    faiss.downcast_index(lists_of(index).quantizer).add(centroids)
    faiss.omp_set_num_threads(threads)


def train_codec(index: Any, fit: np.ndarray) -> None:
    """As faiss's `train` once lists have centroids; but the nearest are found by `Centroids`, in a quarter of the time, and of too
    many vectors evenly spaced ones are taken."""
    import faiss

    inner = lists_of(index)
    if isinstance(inner, faiss.IndexIVFFlat | faiss.IndexIVFRaBitQ):  # whose codes know nothing but the centroids
        inner.is_trained = index.is_trained = True
        return
    points = rotate(index, fit)
    if 0 < (most := inner.train_encoder_num_vectors()) < len(points):
        points = points[np.linspace(0, len(points) - 1, most).astype(np.int64)]
    lists = None
    if inner.by_residual:
        found = nearest_of(inner.quantizer)(points)
        points, lists = points - centroids_of(inner)[found], faiss.swig_ptr(found)
    inner.train_encoder(len(points), faiss.swig_ptr(points), lists)
    inner.is_trained = index.is_trained = True


@dataclass(frozen=True)
class TrainCells(OfParts):
    """The verb of the one shard with part of the sample: the first level, published as CELLS, float32 [cells, dim]."""

    plan: TrainPlan
    cells: int
    folder: Folder
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def worker(self) -> Callable[[Tables], Tables]:
        compute_with(self.threads)

        def work(bundle: Tables) -> Tables:
            sample = read_training_vectors(bundle[PATHS], self.plan.dim, self.storage)
            self.folder.claim(CELLS, npy(kmeans(sample, self.cells, self.plan.products)))
            return {"rows": pa.table({"cells": [self.cells]})}

        return work


@dataclass(frozen=True)
class PartitionByCell(OfParts):
    """The verb: some parts of the sample in the order of their vectors' cells, a row group a cell."""

    plan: TrainPlan
    folder: Folder
    threads: int
    storage: Mapping[str, Any] = field(repr=False)

    def worker(self) -> Callable[[Tables], Tables]:
        compute_with(self.threads)
        cells = from_npy(self.folder.read(CELLS))
        centroids = Centroids(cells, self.plan.products)

        def work(bundle: Tables) -> Tables:
            table = pa.concat_tables(read_parts(bundle[PATHS], [VECTOR, HELD], self.storage))
            table = table.filter(pc.invert(table[HELD])).select([VECTOR]).combine_chunks()
            owners = centroids.nearest(matrix(table[VECTOR]))
            groups = np.bincount(owners, minlength=len(cells)).tolist()
            dealt = table.take(pa.array(np.argsort(owners, kind="stable")))
            return {"rows": dealt.replace_schema_metadata({GROUPS: json.dumps(groups)})}

        return work


@dataclass(frozen=True)
class ClusterCell(OfParts):
    """The verb: the centroids of a cell. shares: how many, by shard."""

    plan: TrainPlan
    shares: tuple[int, ...]
    threads: int
    columns: pa.Schema
    storage: Mapping[str, Any] = field(repr=False)

    def prepare(self, shard: Shard) -> tuple[Tables, dict[str, float]]:
        began = time.perf_counter()
        table = read_rows(shard, [VECTOR], self.columns, self.storage)
        share = {FACTS: json.dumps({"share": self.shares[shard.number]})}
        return {"rows": table.select([VECTOR]).replace_schema_metadata(share)}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Tables], Tables]:
        compute_with(self.threads)

        def work(bundle: Tables) -> Tables:
            share = json.loads(bundle["rows"].schema.metadata[FACTS])["share"]
            points = matrix(bundle["rows"][VECTOR])
            made = kmeans(points, share, self.plan.products) if share else points[:0]
            return {"rows": pa.table({VECTOR: column(made)})}

        return work


def cells_at_once(parts: int, rows: float, dim: int) -> int:
    """Parts of the sample a shard of dealing."""
    return max(1, int(DEALT_BYTES * parts // max(rows * 4 * dim, 1)))


def shares(points: np.ndarray, lists: int) -> np.ndarray:
    """int64 [cells]: `lists` centroids over cells of so many points, in proportion, and no more than points."""
    ends = np.cumsum(points) * lists // max(int(points.sum()), 1)
    return np.minimum(np.diff(ends, prepend=0), points)


def npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))

"""The costs of a build on one core of this machine: a small build of random vectors, each of its jobs timed.

Seconds are those that a core works (process time): waits for a store are left out. All of it takes a few seconds. Random vectors
have no neighbourhoods: a graph is slower with them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from ...engine.mapper import ShardRunner, Stage
from ...engine.parts import Part, parquet_bytes, write_manifest
from ...engine.planner import Planner
from ...engine.run import Run
from ...engine.workers import CpuWorkerOptions
from ...errors import RunError
from ...storage.filesystem import StorageOptions
from ...storage.folder import Folder
from ..build.codec import save_index, transforms_of
from ..build.config import IndexBuild, IndexConfig, MakeMapper
from ..build.layout import TRAINED, VECTOR
from ..build.recall import MAX_CUT
from ..build.recall_job import Measurement
from ..build.segments import segments_for
from ..build.segments_job import add, encode
from ..build.threads import compute_with
from ..build.train import CODEC_ROWS, TrainPlan, set_centroids, train_codec
from ..build.train_job import sample
from ..build.vector_source import VectorOptions
from ..exact.topk import exact_top_k
from ..kinds import FLAT_LISTS, lists_of
from .stages import Costs, Estimator

BYTES, MIN_ROWS, MAX_ROWS = 16 << 20, 1024, 16_384  # of the small build's vectors, float32
MAX_LISTS, MAX_QUERIES = 256, 256  # of the small build
MAX_CENTROIDS, LOOKUPS = 4096, 1024  # that are compared; vectors that are searched in a graph of them
# Settings of faiss that exact search changes for its process.
BLAS_SETTINGS = [f"distance_compute_blas_{name}" for name in ("query_bs", "database_bs", "threshold")]


@dataclass(frozen=True)
class SmallBuild(IndexBuild):
    """A build on one core of this process. seconds: of that core, by job."""

    seconds: dict[str, float] = field(default_factory=dict)

    def run_planned(
        self, folder: Folder, label: str, mapper: MakeMapper, planner: Planner, settings: Mapping[str, Any]
    ) -> list[Part]:
        """Do all shards here, without a lease or messages. Raises RunError for one that fails."""
        run = Run.open(folder, settings, planner, about={})
        stage = Stage(mapper(run, planner.workers.resolve()), folder, run.part_names())
        runner, parts = ShardRunner(stage), []
        began = time.process_time()
        for shard in run.shards():
            receipt = runner.run(shard)
            if receipt.part is None:
                raise RunError(f"{label}: {receipt.failure}")
            parts.append(Part(**receipt.part))
        self.seconds[settings["job"]] = time.process_time() - began
        write_manifest(folder, parts)
        return parts


def measure_costs(build: IndexBuild) -> Costs:
    """The costs of a build of this kind. Files are written in a temporary folder only."""
    dim, lists = build.format.dim, build.choice.lists
    plan = TrainPlan(build.kind, dim, lists, build.config.metric)
    rows = min(MAX_ROWS, max(MIN_ROWS, BYTES // (4 * dim)))
    vectors = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with _one_thread(), TemporaryDirectory(prefix="shoal-dry-run-") as place:
        small = _small_build(build, Folder(place), vectors)
        trained, seconds = _train(replace(plan, lists=small.choice.lists), vectors)
        small.folder.publish(TRAINED, trained)
        sample(small)
        (codes,) = parts = encode(small)
        (generation,) = add(small, parts)["generations"]
        measurement = Measurement.open(small)
        (hits,) = files = measurement.probe("", generation)[0]
        measurement.merge_lists(files)
        centroid, rates = _lookup(plan, vectors) if build.kind.has_lists else (0.0, {"compared": 0.0})
        search, queries = exact_top_k("cpu", 1), vectors[:MAX_QUERIES]
        scoring = _seconds(lambda: search(queries, vectors, np.arange(rows), MAX_CUT + 1))
        rates |= {
            "trained": seconds,
            "merged": small.seconds["lists"] / hits.rows,
            "scored": scoring / (len(queries) * rows),
        }
        codec = len(trained) - 4 * dim * small.choice.lists
        costs = Costs(rates, codec, centroid, codes.bytes / codes.rows, hits.bytes / hits.rows)
        stages = Estimator(small, small.measure_input(), costs).stages
    for stage in stages:
        for name in stage.work.keys() - rates.keys():  # of the job alone; the others, which `costs` has, are known
            own = small.seconds[stage.name.removeprefix("measure: ")] - costs.seconds(stage.work)
            rates[name] = max(own, 1e-9) / stage.work[name]
    return costs


def _small_build(build: IndexBuild, folder: Folder, vectors: np.ndarray) -> SmallBuild:
    """A build of this kind of a few vectors, its lists as long as those of a segment."""
    rows, dim = vectors.shape
    scale = 127 if build.format.type == "int8" else 1
    values = pa.array(scale * vectors.reshape(-1)).cast(pa.type_for_alias(build.format.type), safe=False)
    options = VectorOptions(input=folder.path("vectors"), vector_column=VECTOR, shard_rows=rows)
    table = pa.table({VECTOR: pa.FixedSizeListArray.from_arrays(values, dim)})
    folder.below("vectors").publish("part.parquet", parquet_bytes(table))
    workers, queries = CpuWorkerOptions(executor="local", cpus_per_worker=1), min(MAX_QUERIES, rows // 10)
    config = IndexConfig(
        vectors=options, metric=build.config.metric, recall_queries=queries, storage=StorageOptions(), workers=workers
    )
    segments = segments_for(build.rows * build.row_bytes, 4.0 * build.choice.lists * dim, build.config.merge or 1)
    few = min(MAX_LISTS, max(1, rows * build.choice.lists * segments // build.rows))
    choice = replace(build.choice, lists=min(build.choice.lists, few))
    format = replace(build.format, has_reasons=False)
    return SmallBuild(config, folder.below("index"), format, choice, rows, queries, id_column=None, key="")


@contextmanager
def _one_thread() -> Iterator[None]:
    """faiss and torch with one thread; their settings come back in the end."""
    import faiss
    import torch

    threads, settings = torch.get_num_threads(), {name: getattr(faiss.cvar, name) for name in BLAS_SETTINGS}
    compute_with(1)
    try:
        yield
    finally:
        compute_with(threads)
        for name, value in settings.items():
            setattr(faiss.cvar, name, value)


def _lookup(plan: TrainPlan, vectors: np.ndarray) -> tuple[float, dict[str, float]]:
    """Bytes of a list in the empty index, and the rates of the search for lists; some of the vectors are centroids."""
    import faiss

    from ..build.nearest_centroid import Centroids

    count = min(plan.lists, MAX_CENTROIDS, len(vectors) * 3 // 4)
    points, others = vectors[:count], vectors[count:][:LOOKUPS]
    centroids = Centroids.for_vectors(points, plan.inner_product, others)
    rates = {"compared": _seconds(lambda: centroids.nearest_rounded(vectors)) / (vectors.size * count)}
    if plan.lists <= FLAT_LISTS:
        return 4.0 * plan.dim, rates
    index = plan.empty()  # owns the graph
    graph: Any = faiss.downcast_index(lists_of(index).quantizer)
    rates["linked"] = _seconds(lambda: graph.add(points)) / (count * math.log(count))
    rates["searched"] = _seconds(lambda: graph.search(others, 1)) / (len(others) * math.log(count))
    return len(save_index(graph)) / count, rates


def _train(plan: TrainPlan, vectors: np.ndarray) -> tuple[bytes, float]:
    """The empty index, with vectors for centroids; and seconds to train its codec, a learned rotation by one iteration of it."""
    import faiss

    index, fit, seconds = plan.empty(), np.resize(vectors, (MAX_ROWS, plan.dim)), 0.0
    for transform in transforms_of(index):
        iterations = 0
        if isinstance(transform, faiss.OPQMatrix):  # a learned rotation
            iterations = transform.niter
            transform.niter, transform.niter_pq_0 = 1, transform.niter_pq
        seconds += iterations * _seconds(partial(transform.train, fit)) * CODEC_ROWS / len(fit)
    if plan.kind.has_lists:
        set_centroids(index, vectors[: plan.lists])
        seconds += _seconds(lambda: train_codec(index, fit))
    return save_index(index), seconds


def _seconds(step: Callable[[], object]) -> float:
    """Seconds that a core works on a step."""
    began = time.process_time()
    step()
    return time.process_time() - began

"""The driver of the measurement: the segments' search of some queries, against exact search of all vectors."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...engine.parts import FOOTER_THREADS, Part, parquet_bytes, read_facts
from ...engine.run import Run, read_plan
from ...engine.workers import WorkerPlan
from ...errors import InputError
from ...storage.filesystem import open_file
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..exact.top_k_merge import TopKMerge
from ..kinds import search_parameter_values
from .config import IndexBuild
from .layout import ROWS, TRAINED
from .recall import EXACT, LISTS, PAIR_COLUMNS, ExactScores, Lists, Pairs, RecallPoint, lists_by_value, recall_points
from .recall_mappers import QUERIES, GroundTruthMapper, ProbeSegment, read_queries
from .recall_queries import fixed, queries_of
from .segments_job import Manifest, lists_in, segment_files
from .stage_parts import StageFile, files_of, files_plan, read_parts, rows_of_shards, some_shards

log = logging.getLogger("shoal")

PARTS_AT_ONCE = 64  # of lists, that are merged into one


@dataclass(frozen=True)
class Measurement:
    """The queries, published in a folder as QUERIES. own: the row that each one is, or NO_ROW. plan, columns: of the encoded rows."""

    folder: Folder
    name: str
    own: np.ndarray
    values: tuple[int, ...]
    plan: pa.Table
    columns: pa.Schema


def measure_recall(build: IndexBuild, manifest: Manifest) -> tuple[list[RecallPoint], int]:
    """The recall at each value of the search parameter; and the number of queries. Only new generations are searched again."""
    measurement = open_measurement(build)
    queries = len(measurement.own)
    seconds = dict.fromkeys(measurement.values, 0.0)
    probes: list[StageFile] = []
    exact: list[StageFile] = []
    pair_tables: list[pa.Table] = []
    for generation in manifest["generations"]:
        names = [segment["name"] for segment in generation["segments"]]
        key = fingerprint(measurement.name, generation["shards"], names)
        probed, parts = probe(build, measurement, key, generation)
        for fact in read_facts(probed, parts):
            for value in measurement.values:
                seconds[value] += fact["seconds"][str(value)]
        lists = _merged(build, files_of(probed, parts))
        probes += lists
        files = _search_exactly(build, measurement, key, generation, lists)
        pair_tables += _read_pairs(files, build.storage)
        exact += _merged(build, files)
    numbers = {value: numbers for value, (_, numbers) in _read_lists(build, probes, queries).items()}
    nearest = _read_lists(build, exact, queries)[EXACT]
    measurement.folder.sweep(done=measurement.folder.list())
    return recall_points(numbers, ExactScores(nearest, pair_tables), seconds), queries


def open_measurement(build: IndexBuild) -> Measurement:
    """Publish the queries, unless a command did. Raises InputError where there are none."""
    plan, columns = read_plan(build.folder.below(ROWS))
    name = fingerprint(build.key, fixed(build), build.config.recall_queries)
    folder = build.stage("queries", name)
    if not folder.exists(QUERIES):
        folder.claim(QUERIES, parquet_bytes(queries_of(build, plan)))
    _, own = read_queries(folder)
    if not len(own):
        raise InputError(
            "no vector to measure recall with: no row that was held out of the sample has one. Give some with --queries"
        )
    if len(own) < build.config.recall_queries:
        log.info(f"recall is measured with {len(own):,} queries: there are no more")
    return Measurement(folder, name, own, search_parameter_values(build.kind, lists_in(build)), plan, columns)


def probe(
    build: IndexBuild, measurement: Measurement, key: str, generation: Mapping[str, Any]
) -> tuple[Folder, list[Part]]:
    """Search the generation's segments; the folder of the stage and its parts."""
    folder, files = build.stage("probe", key), segment_files(build, generation["segments"])

    def mapper(run: Run, workers: WorkerPlan) -> ProbeSegment:
        metric, values = build.config.metric, measurement.values
        return ProbeSegment(build.kind, metric, values, measurement.folder, workers.threads, build.storage)

    parts = build.run_stage(
        folder,
        "searching the index",
        mapper,
        lambda: files_plan([[file] for file in files]),
        {"job": "probe", "key": key, "values": list(measurement.values)},
        weight_bytes=build.folder.list(TRAINED)[TRAINED],  # every segment repeats the empty index
    )
    return folder, parts


def _search_exactly(
    build: IndexBuild,
    measurement: Measurement,
    key: str,
    generation: Mapping[str, Any],
    lists: Sequence[StageFile],
) -> list[StageFile]:
    """Search the generation's vectors; the parts, with the exact scores of the pairs in the segments' lists."""
    folder, pairs = build.stage("exact", key), f"pairs-{key}.parquet"
    if not measurement.folder.exists(pairs):
        numbers = [numbers for _, numbers in _read_lists(build, lists, len(measurement.own)).values()]
        measurement.folder.claim(pairs, parquet_bytes(Pairs.of_lists(numbers).to_table()))
    shards = some_shards(measurement.plan, *generation["shards"])
    rows = rows_of_shards(shards)
    firsts = tuple((generation["segments"][0]["first"] + np.cumsum(rows) - rows).tolist())

    def mapper(run: Run, workers: WorkerPlan) -> GroundTruthMapper:
        return GroundTruthMapper(
            source=build.source(run.columns),
            metric=build.config.metric,
            folder=measurement.folder,
            pairs=pairs,
            firsts=firsts,
            threads=workers.threads,
        )

    label, settings = "exact search of the queries", {"job": "exact", "key": key}
    parts = build.run_stage(folder, label, mapper, lambda: (shards, measurement.columns), settings)
    return files_of(folder, parts)


def _merged(build: IndexBuild, files: list[StageFile]) -> list[StageFile]:
    """The same lists in at most PARTS_AT_ONCE parts, which the driver can read."""
    for _ in levels_of_lists(len(files))[1:]:
        files = merge_lists(build, files)
    return files


def levels_of_lists(parts: int) -> list[int]:
    """Parts of lists: before they are merged, and after each merge, until the driver can read them."""
    levels = [parts]
    while levels[-1] > PARTS_AT_ONCE:
        levels.append(-(-levels[-1] // PARTS_AT_ONCE))
    return levels


def merge_lists(build: IndexBuild, files: list[StageFile]) -> list[StageFile]:
    """The same lists, each PARTS_AT_ONCE parts merged into one."""
    key = fingerprint([file.path for file in files])
    folder = build.stage("lists", key)
    groups = [files[start : start + PARTS_AT_ONCE] for start in range(0, len(files), PARTS_AT_ONCE)]
    parts = build.run_stage(
        folder,
        "merging the lists",
        lambda run, workers: TopKMerge(LISTS, build.storage),
        lambda: files_plan(groups),
        {"job": "lists", "key": key},
    )
    return files_of(folder, parts)


def _read_lists(build: IndexBuild, files: Sequence[StageFile], queries: int) -> dict[int, Lists]:
    """The lists in some parts merged, by value of the search parameter. Memory: two lists a query and value."""
    tables = read_parts([file.path for file in files], LISTS.columns, build.storage)
    return lists_by_value(LISTS.merge(tables), queries)


def _read_pairs(files: Sequence[StageFile], storage: Mapping[str, Any]) -> list[pa.Table]:
    """The exact scores of pairs: the last row group of each part."""

    def read(file: StageFile) -> pa.Table:
        with open_file(file.path, storage) as opened, pq.ParquetFile(opened) as parquet:
            groups = range(parquet.num_row_groups)[-1:]
            table = parquet.read_row_groups(list(groups), columns=list(PAIR_COLUMNS))
        return table.filter(table["exact_score"].is_valid())

    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return list(threads.map(read, files))

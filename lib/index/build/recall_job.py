"""The driver of the measurement: the segments' search of some queries, against exact search of all vectors."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...engine.parts import parquet_bytes, read_facts
from ...engine.run import read_plan
from ...engine.stage_files import StageFile, files_of, files_plan, grouped
from ...errors import InputError
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..exact.top_k_merge import TopKMerge
from ..kinds import search_parameter_values
from .config import IndexBuild
from .layout import ROWS, TRAINED
from .recall import EXACT, LISTS, PAIR_COLUMNS, ExactScores, Lists, RecallPoint, lists_by_value, pairs_of, recall_points
from .recall_mappers import QUERIES, GroundTruthMapper, ProbeSegment, read_queries
from .recall_queries import fixed, queries_of
from .segments_job import Manifest, lists_in, segment_files
from .stage_parts import read_parts, read_row_groups, rows_of_shards, some_shards

log = logging.getLogger("shoal")

PARTS_AT_ONCE = 64  # of lists, that are merged into one


@dataclass(frozen=True)
class Measurement:
    """The searches of some queries, published in a folder as QUERIES.

    own: the row that each query is, or NO_ROW. values: of the search parameter. plan, columns: of the encoded rows.
    """

    build: IndexBuild
    folder: Folder
    name: str
    own: np.ndarray
    values: tuple[int, ...]
    plan: pa.Table
    columns: pa.Schema

    @classmethod
    def open(cls, build: IndexBuild) -> "Measurement":
        """Publish the queries, unless a command did. Raises InputError where there are none."""
        plan, columns = read_plan(build.folder.below(ROWS))
        name = fingerprint(build.key, fixed(build), build.config.recall_queries)
        folder = build.stage("queries", name)
        if not folder.exists(QUERIES):
            folder.claim(QUERIES, parquet_bytes(queries_of(build, plan)))
        _, own = read_queries(folder)
        if not len(own):
            raise InputError("no vector to measure recall with: no held-out row of the sample has one. Give --queries")
        if len(own) < build.config.recall_queries:
            log.info(f"recall is measured with {len(own):,} queries: there are no more")
        return cls(build, folder, name, own, search_parameter_values(build.kind, lists_in(build)), plan, columns)

    def probe(self, key: str, generation: Mapping[str, Any]) -> tuple[list[StageFile], list[dict[str, Any]]]:
        """Search the generation's segments; the lists of each, and the facts."""
        build, folder = self.build, self.build.stage("probe", key)
        kind, metric = build.kind, build.config.metric
        parts = build.run_stage(
            folder,
            "searching the index",
            lambda run, workers: ProbeSegment(kind, metric, self.values, self.folder, workers.threads),
            files_plan(grouped(segment_files(build.folder, generation["segments"]), 1)),
            {"job": "probe", "key": key, "values": list(self.values)},
            weight_bytes=build.folder.list(TRAINED)[TRAINED],  # every segment repeats the empty index
        )
        return files_of(folder, parts), read_facts(folder, parts)

    def search_exactly(self, key: str, generation: Mapping[str, Any], lists: Sequence[StageFile]) -> list[StageFile]:
        """Search the generation's vectors; the parts, with the exact scores of the pairs in the segments' lists."""
        build, folder, pairs = self.build, self.build.stage("exact", key), f"pairs-{key}.parquet"
        if not self.folder.exists(pairs):
            numbers = [numbers for _, numbers in self.read_lists(lists).values()]
            self.folder.claim(pairs, parquet_bytes(pairs_of(numbers)))
        shards, metric = some_shards(self.plan, *generation["shards"]), build.config.metric
        rows = rows_of_shards(shards)
        firsts = tuple((generation["segments"][0]["first"] + np.cumsum(rows) - rows).tolist())
        source = build.source(self.columns)
        parts = build.run_stage(
            folder,
            "exact search of the queries",
            lambda run, workers: GroundTruthMapper(source, metric, self.folder, pairs, firsts, workers.threads),
            shards,
            {"job": "exact", "key": key},
            columns=self.columns,
        )
        return files_of(folder, parts)

    def merged(self, files: list[StageFile]) -> list[StageFile]:
        """The same lists in at most PARTS_AT_ONCE parts, which the driver can read."""
        for _ in levels_of_lists(len(files))[1:]:
            files = self.merge_lists(files)
        return files

    def merge_lists(self, files: list[StageFile]) -> list[StageFile]:
        """The same lists, each PARTS_AT_ONCE parts merged into one."""
        build, key = self.build, fingerprint([file.path for file in files])
        folder, settings = build.stage("lists", key), {"job": "lists", "key": key}
        plan, merge = files_plan(grouped(files, PARTS_AT_ONCE)), TopKMerge(LISTS, build.storage)
        parts = build.run_stage(folder, "merging the lists", lambda run, workers: merge, plan, settings)
        return files_of(folder, parts)

    def read_lists(self, files: Sequence[StageFile]) -> dict[int, Lists]:
        """The lists in some parts merged, by value of the search parameter. Memory: two lists a query and value."""
        tables = read_parts([file.path for file in files], LISTS.columns, self.build.storage)
        return lists_by_value(LISTS.merge(tables), len(self.own))


def measure_recall(build: IndexBuild, manifest: Manifest) -> tuple[list[RecallPoint], int]:
    """The recall at each value of the search parameter; and the number of queries. Only new generations are searched again."""
    measurement = Measurement.open(build)
    seconds: Counter[str] = Counter()
    probes: list[StageFile] = []
    exact: list[StageFile] = []
    pairs: list[pa.Table] = []
    for generation in manifest["generations"]:
        names = [segment["name"] for segment in generation["segments"]]
        key = fingerprint(measurement.name, generation["shards"], names)
        lists, facts = measurement.probe(key, generation)
        for fact in facts:
            seconds.update(fact["seconds"])
        lists = measurement.merged(lists)
        probes += lists
        files = measurement.search_exactly(key, generation, lists)
        # The last row group of a part has the exact scores of pairs.
        scored, paths = pc.field("exact_score").is_valid(), [file.path for file in files]
        pairs.append(read_row_groups(paths, -1, PAIR_COLUMNS, scored, build.storage))
        exact += measurement.merged(files)
    numbers = {value: numbers for value, (_, numbers) in measurement.read_lists(probes).items()}
    nearest = ExactScores(measurement.read_lists(exact)[EXACT], pa.concat_tables(pairs))
    measurement.folder.sweep(done=measurement.folder.list())
    return recall_points(numbers, nearest, {int(value): spent for value, spent in seconds.items()}), len(
        measurement.own
    )


def levels_of_lists(parts: int) -> list[int]:
    """Parts of lists: before they are merged, and after each merge, until the driver can read them."""
    levels = [parts]
    while levels[-1] > PARTS_AT_ONCE:
        levels.append(-(-levels[-1] // PARTS_AT_ONCE))
    return levels

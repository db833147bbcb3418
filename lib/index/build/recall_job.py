"""The driver of the measurement: what the pieces find, against exact search over everything there is."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...engine.job import Job, carry_out_planned, require_complete
from ...engine.parts import Part, parquet_bytes
from ...engine.run import Run, read_plan
from ...engine.workers import WorkerPlan
from ...errors import InputError
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..kinds import search_parameter_values
from .config import IndexBuild
from .layout import NUMBER, ROWS, TRAINED
from .recall import (
    LISTED,
    PAIR,
    PARTS_AT_ONCE,
    QUERIES,
    Exact,
    GroundTruthMapper,
    Lists,
    Measured,
    ProbeSegment,
    Shorten,
    measured,
    merge_top_k,
    pairs,
)
from .recall_queries import fixed, queries_of
from .segments_job import Manifest, lists_in, piece_files
from .stage_parts import File, facts_of, files_of, files_plan, read_parts, some_shards
from .train_job import source

log = logging.getLogger("shoal")


def measure_recall(build: IndexBuild, manifest: Manifest) -> tuple[list[Measured], int]:
    """By effort; and how many queries it is measured with. Only what new generations hold is searched again."""
    plan, columns = read_plan(build.folder.below(ROWS))
    name = fingerprint(build.key, fixed(build), build.config.recall_queries)
    place = build.stage(f"queries-{name}")
    if not place.exists(QUERIES):
        place.claim(QUERIES, parquet_bytes(queries_of(build, plan)))
    own = pq.read_table(pa.BufferReader(place.read(QUERIES)))[NUMBER].to_numpy()
    if not len(own):
        raise InputError(
            "no vector to measure recall with: no row that was held out of the sample has one. Give some with --queries"
        )
    if len(own) < build.config.recall_queries:
        log.info(f"recall is measured with {len(own):,} queries: there are no more")
    wanted = search_parameter_values(build.kind, lists_in(build))
    truth: list[File] = []
    probes: list[File] = []
    seconds = dict.fromkeys(wanted, 0.0)
    for generation in manifest["generations"]:
        key = fingerprint(name, generation["shards"], [piece["name"] for piece in generation["pieces"]])
        shards = some_shards(plan, *generation["shards"])
        probed, folder = _probe(build, place, key, generation, wanted), build.stage(f"probe-{key}")
        for fact in facts_of(folder, probed):
            for effort in wanted:
                seconds[effort] += fact["seconds"][str(effort)]
        found = _shortened(build, place, files_of(folder, probed))
        if not place.exists(_found(key)):
            lists, _ = _lists(build, found, own)
            place.claim(_found(key), parquet_bytes(pa.table({PAIR: pairs(numbers for _, numbers in lists.values())})))
        truth += _shortened(build, place, _truth(build, place, key, shards, columns, generation))
        probes += found
    best = {effort: numbers for effort, (_, numbers) in _lists(build, probes, own)[0].items()}
    nearest, scored = _lists(build, truth, own, pairs(best.values()))
    place.sweep(done=place.list())
    return measured(best, Exact(nearest[0], scored), seconds), len(own)


def _found(key: str) -> str:
    return f"found-{key}.parquet"


def _lists(
    build: IndexBuild, files: Sequence[File], own: np.ndarray, wanted: np.ndarray | None = None
) -> tuple[dict[int, Lists], list[pa.Table]]:
    paths = pa.table({"path": [file.path for file in files]})
    return merge_top_k(read_parts(paths, LISTED, build.storage), own, wanted)


def _shortened(build: IndexBuild, place: Folder, files: list[File]) -> list[File]:
    """The same lists in few enough parts for the driver to go through."""
    if len(files) <= PARTS_AT_ONCE:
        return files
    key = fingerprint([file.path for file in files])
    folder = build.stage(f"lists-{key}")
    job = Job("shortening the lists", {"verb": "lists", "key": key}, _shorten(build, place))
    groups = [files[start : start + PARTS_AT_ONCE] for start in range(0, len(files), PARTS_AT_ONCE)]
    outcome = carry_out_planned(job, build.options(place.url, folder), lambda: files_plan(groups))
    return _shortened(build, place, files_of(folder, require_complete(outcome, folder.url).parts))


def _shorten(build: IndexBuild, place: Folder) -> Callable[[Run, WorkerPlan], Shorten]:
    return lambda ledger, workers: Shorten(place, build.storage)


def _truth(
    build: IndexBuild, place: Folder, key: str, shards: pa.Table, columns: pa.Schema, generation: dict[str, Any]
) -> list[File]:
    """The parts of nearest vectors, and of the scores of what was found."""
    rows = shards.group_by("shard", use_threads=False).aggregate([("rows", "sum")])["rows_sum"].to_numpy()
    start = generation["pieces"][0]["first"]
    firsts = tuple((start + np.cumsum(rows) - rows).tolist())

    def verb(ledger: Run, workers: WorkerPlan) -> GroundTruthMapper:
        return GroundTruthMapper(
            source(build, ledger.columns), build.config.metric, place, _found(key), firsts, workers.threads
        )

    folder = build.stage(f"truth-{key}")
    job = Job("exact search of the queries", {"verb": "truth", "key": key}, verb)
    options = build.options(build.config.input, folder)
    outcome = require_complete(carry_out_planned(job, options, lambda: (shards, columns)), folder.url)
    return files_of(folder, outcome.parts)


def _probe(build: IndexBuild, place: Folder, key: str, generation: dict[str, Any], wanted: Sequence[int]) -> list[Part]:
    """The parts of what the generation's pieces find."""

    def verb(ledger: Run, workers: WorkerPlan) -> ProbeSegment:
        return ProbeSegment(build.kind, build.config.metric, tuple(wanted), place, workers.threads, build.storage)

    folder, files = build.stage(f"probe-{key}"), piece_files(build, generation["pieces"])
    job = Job(
        "searching the index",
        {"verb": "probe", "key": key, "efforts": list(wanted)},
        verb,
        weight_bytes=_trained(build),
    )
    options = build.options(place.url, folder)
    outcome = carry_out_planned(job, options, lambda: files_plan([[file] for file in files]))
    return require_complete(outcome, folder.url).parts


def _trained(build: IndexBuild) -> int:
    """Bytes of the empty index, which every piece repeats and a reader of one holds."""
    return build.folder.list(TRAINED)[TRAINED]

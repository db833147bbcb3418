"""The driver of the search job: texts or vectors in, each query's best passages out, reranked where the command says so.

blocks of queries x segments  --SearchSegment, a shard each-->  the best of each segment
blocks of queries             --TopKMerge, a shard each-->      the best of all; for more than one segment
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ...data.shards import cut_shards, number_shards, tables_of
from ...engine.executor import Outcome
from ...engine.job import Job, require_complete, run_job, stage_folder
from ...engine.parts import Part
from ...engine.planner import FixedPlanner
from ...engine.run import Run, read_run_config
from ...engine.workers import WorkerOptions, WorkerPlan, WorkerRequest
from ...errors import RunError
from ...reranking import job as rerank_job
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..build.layout import SEGMENTS
from ..build.stage_parts import StageFile, files_of, files_plan
from ..exact.mappers import PASSAGE_ID, QUERY_ID, SCORE
from ..exact.top_k_merge import RankedLists, TopKMerge
from . import mappers
from .config import SearchConfig, check, search_value
from .filter import read_allowed_ids
from .hits import ERROR, HITS_AT_ONCE, HITS_SCHEMA
from .mappers import SearchSegment
from .opened_index import OpenedIndex, open_index
from .query import QueryVectors, query_vectors

# Queries a shard, where k is small: each shard opens its segment.
MIN_BLOCK, MAX_BLOCK = 4096, 32_768
BLOCKS = 32  # of queries, where there are enough: so many workers can search one segment


def search(config: SearchConfig) -> Outcome:
    """Embed the queries where they are texts, search, rerank where there is a reranker.

    Raises ShoalError before anything scales, for what cannot work.
    """
    index = open_index(config.index, config.storage.fsspec)
    check(config, index.kind)
    output = config.hits_folder
    output.probe()
    _refuse_another_index(output, index)
    allowed = read_allowed_ids(config, index, output)
    queries = query_vectors(config, index)
    outcome = search_segments(config, index, queries, output, allowed=allowed.name)
    if len(index.segments) > 1:
        parts = require_complete(outcome, output.url).parts
        outcome = merge_segments(config, index, queries, output, parts=parts, allowed=allowed.name)
    if config.second_stage.enabled:
        require_complete(outcome, output.url)
        outcome = rerank_job.rerank(config.rerank_config())
    return replace(outcome, notes=allowed.notes)


def search_segments(
    config: SearchConfig, index: OpenedIndex, queries: QueryVectors, output: Folder, *, allowed: str | None
) -> Outcome:
    """Search each segment: into `output`, or into a stage of it where there are several segments."""

    def mapper(run: Run, workers: WorkerPlan) -> SearchSegment:
        source = queries.source(index, run.columns)
        return SearchSegment.of(index, config, queries=source, allowed=allowed, threads=workers.threads)

    parameter, value = index.kind.search_parameter, search_value(config, index.card, index.kind)
    label = f"searching {index.vectors:,} vectors" + (f", {parameter} {value}" if parameter else "")
    job = Job(label, _settings(config, index, queries, allowed), mapper)
    largest = max(segment["bytes"] for segment in index.segments)
    request = WorkerRequest(_on_cpus(config.workers), weight_bytes=largest)
    folder = _segments_folder(output) if len(index.segments) > 1 else output
    return run_job(job, folder, FixedPlanner(lambda: search_plan(config, index, queries), request))


def merge_segments(
    config: SearchConfig,
    index: OpenedIndex,
    queries: QueryVectors,
    output: Folder,
    *,
    parts: Sequence[Part],
    allowed: str | None,
) -> Outcome:
    """Merge the hits of all segments. parts: of the search of the segments, all blocks of a segment side by side."""
    files = files_of(_segments_folder(output), parts)
    blocks = len(files) // len(index.segments)
    groups = [files[number::blocks] for number in range(blocks)]
    lists = RankedLists(query=(QUERY_ID,), item=PASSAGE_ID, k=config.top_k, score=SCORE, reasons=(ERROR,))
    settings = _settings(config, index, queries, allowed) | {"job": "merge of segments"}
    job = Job("merging the hits of the segments", settings, lambda run, workers: TopKMerge(lists, output.options))
    request = WorkerRequest(_on_cpus(config.workers))
    return run_job(job, output, FixedPlanner(lambda: (files_plan(groups)[0], HITS_SCHEMA), request))


def search_plan(config: SearchConfig, index: OpenedIndex, queries: QueryVectors) -> tuple[pa.Table, pa.Schema]:
    """A shard for each segment and block of queries, the blocks of a segment side by side; and the columns of the queries."""
    rows = block_rows(queries.corpus.rows, config.top_k)
    blocks = tables_of(cut_shards(queries.corpus, rows), mappers.QUERIES)
    place = index.folder.below(SEGMENTS)
    files = [StageFile(place.path(each["name"]), each["vectors"], each["bytes"]) for each in index.segments]
    segments = tables_of(files_plan([[file] for file in files])[0], mappers.SEGMENTS)
    shards = [pa.concat_tables([block, segment]) for segment in segments for block in blocks]
    return number_shards(shards), queries.corpus.schema


def block_rows(queries: float, k: int) -> int:
    """Queries a shard, at most as many as a worker can hold the hits of."""
    return max(1, min(MAX_BLOCK, max(MIN_BLOCK, int(queries) // BLOCKS), HITS_AT_ONCE // k))


def _settings(config: SearchConfig, index: OpenedIndex, queries: QueryVectors, allowed: str | None) -> dict[str, Any]:
    """Everything that fixes the hits. A search with other settings is another search."""
    return {
        "job": "search",
        "queries": queries.url,
        "files": fingerprint([(file.name, file.size, file.tag) for file in queries.corpus.files]),
        "columns": [queries.column, queries.id_column],
        "index": index.identity,
        "block": block_rows(queries.corpus.rows, config.top_k),
        "top_k": config.top_k,
        "search_value": search_value(config, index.card, index.kind),
        "allowed": allowed,
    }


def _segments_folder(output: Folder) -> Folder:
    """The stage with each segment's own hits."""
    return stage_folder(output, "segments")


def _on_cpus(options: WorkerOptions) -> WorkerOptions:
    """The same workers, without GPUs: faiss searches on CPUs."""
    return replace(options, gpus_per_worker=0.0)


def _refuse_another_index(output: Folder, index: OpenedIndex) -> None:
    """Raises RunError where the output has hits of an index that is another now."""
    run_config = read_run_config(output) or read_run_config(_segments_folder(output))
    before, now = run_config and run_config["settings"].get("index"), index.identity
    if before and before != now:
        raise RunError(
            f"{output.url} holds lists of an index of {before['vectors']:,} vectors in {before['segments']:,} segments, and that at "
            f"{index.folder.url} has {now['vectors']:,} in {now['segments']:,} now: it has grown, was made anew, or is another. "
            "Lists of both cannot be mixed: choose a new --output"
        )

"""The driver of the search job: texts or vectors in, each query's best passages out, reranked where the command says so.

blocks of queries x segments  --SearchSegment, a shard each-->  the best of each segment
blocks of queries             --TopKMerge, a shard each-->      the best of all; for more than one segment
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ...data.shards import cut_shards, number_shards, tables_of
from ...engine.executor import Outcome
from ...engine.job import Job, require_complete, run_job, stage_folder
from ...engine.planner import FixedPlanner
from ...engine.run import Run, read_run_config
from ...engine.stage_files import StageFile, files_of, files_plan, grouped
from ...engine.workers import WorkerPlan, WorkerRequest
from ...errors import RunError
from ...reranking import job as rerank_job
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..build.layout import ROWS
from ..build.segments_job import segment_files
from ..exact.mappers import PASSAGE_ID, QUERY_ID, SCORE
from ..exact.top_k_merge import RankedLists, TopKMerge
from . import mappers
from .config import SearchConfig, check, resolve_search_parameter
from .filter import read_allowed_ids
from .mappers import ERROR, HITS_AT_ONCE, HITS_SCHEMA, SearchSegment
from .opened_index import OpenedIndex, open_index
from .query import QueryVectors, query_vectors

# Queries a shard, where k is small: each shard opens its segment.
MIN_BLOCK, MAX_BLOCK = 4096, 32_768
BLOCKS = 32  # of queries, where there are enough: so many workers can search one segment


@dataclass(frozen=True)
class Search:
    """The inputs of a search. allowed: the file of the ids that it may return, in the folder of the hits; None for all."""

    config: SearchConfig
    index: OpenedIndex
    queries: QueryVectors
    allowed: str | None

    @property
    def value(self) -> int:
        """The value of the kind's search parameter."""
        return resolve_search_parameter(self.config, self.index.card, self.index.kind)

    @property
    def request(self) -> WorkerRequest:
        """Workers without GPUs, since faiss searches on CPUs; each loads a segment."""
        largest = max(segment["bytes"] for segment in self.index.segments)
        return WorkerRequest(replace(self.config.workers, gpus_per_worker=0.0), weight_bytes=largest)

    def settings(self) -> dict[str, Any]:
        """Everything that fixes the hits. A search with other settings is another search."""
        corpus = self.queries.corpus
        return {
            "job": "search",
            "queries": self.queries.url,
            "files": fingerprint([(file.name, file.size, file.tag) for file in corpus.files]),
            "columns": [self.queries.column, self.queries.id_column],
            "index": self.index.identity,
            "block": block_rows(corpus.rows, self.config.top_k),
            "top_k": self.config.top_k,
            "search_value": self.value,
            "allowed": self.allowed,
        }

    def mapper(self, run: Run, workers: WorkerPlan) -> SearchSegment:
        index = self.index
        return SearchSegment(
            queries=self.queries.source(index, run.columns),
            kind=index.kind,
            metric=index.card["metric"],
            value=self.value,
            k=self.config.top_k,
            ranges={segment["name"]: (segment["first"], segment["rows"]) for segment in index.segments},
            rows=index.folder.below(ROWS),
            output=self.config.hits_folder,
            allowed=self.allowed,
            threads=workers.threads,
        )


def search(config: SearchConfig) -> Outcome:
    """Embed the queries where they are texts, search, rerank where there is a reranker.

    Raises ShoalError before anything scales, for what cannot work.
    """
    index = open_index(config.index, config.storage.fsspec)
    check(config, index.kind)
    output = config.hits_folder
    output.probe()
    _refuse_another_index(output, index)
    allowed, notes = read_allowed_ids(config, index, output)
    inputs = Search(config, index, query_vectors(config, index), allowed)
    if len(index.segments) == 1:
        outcome = search_segments(inputs, output)
    else:
        stage = _segments_folder(output)
        parts = require_complete(search_segments(inputs, stage), output.url).parts
        outcome = merge_segments(inputs, files_of(stage, parts), output)
    if config.second_stage.enabled:
        require_complete(outcome, output.url)
        outcome = rerank_job.rerank(config.rerank_config())
    return replace(outcome, notes=notes)


def search_segments(inputs: Search, folder: Folder) -> Outcome:
    """Search each segment by itself."""
    index, parameter = inputs.index, inputs.index.kind.search_parameter
    label = f"searching {index.vectors:,} vectors" + (f", {parameter} {inputs.value}" if parameter else "")
    job = Job(label, inputs.settings(), inputs.mapper)
    return run_job(job, folder, FixedPlanner(lambda: search_plan(inputs), inputs.request))


def merge_segments(inputs: Search, files: Sequence[StageFile], output: Folder) -> Outcome:
    """Merge the hits of all segments. files: of the search of the segments, all blocks of a segment side by side."""
    blocks = len(files) // len(inputs.index.segments)
    plan = files_plan([files[number::blocks] for number in range(blocks)])
    lists = RankedLists((QUERY_ID,), PASSAGE_ID, inputs.config.top_k, score=SCORE, reasons=(ERROR,))
    settings = inputs.settings() | {"job": "merge of segments"}
    job = Job("merging the hits of the segments", settings, lambda run, workers: TopKMerge(lists, output.options))
    return run_job(job, output, FixedPlanner(lambda: (plan, HITS_SCHEMA), replace(inputs.request, weight_bytes=0)))


def search_plan(inputs: Search) -> tuple[pa.Table, pa.Schema]:
    """A shard for each segment and block of queries, the blocks of a segment side by side; and the columns of the queries."""
    index, corpus = inputs.index, inputs.queries.corpus
    blocks = tables_of(cut_shards(corpus, block_rows(corpus.rows, inputs.config.top_k)), mappers.QUERIES)
    files = segment_files(index.folder, index.segments)
    segments = tables_of(files_plan(grouped(files, 1)), mappers.SEGMENTS)
    shards = [pa.concat_tables([block, segment]) for segment in segments for block in blocks]
    return number_shards(shards), corpus.schema


def block_rows(queries: float, k: int) -> int:
    """Queries a shard, at most as many as a worker can hold the hits of."""
    return max(1, min(MAX_BLOCK, max(MIN_BLOCK, int(queries) // BLOCKS), HITS_AT_ONCE // k))


def _segments_folder(output: Folder) -> Folder:
    """The stage with each segment's own hits."""
    return stage_folder(output, "segments")


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

"""The driver of exact search: vectors of queries and of passages, as the embed job wrote them, become a ranking of each query.

blocks of queries x ranges of passages  --ExactSearchMapper, a shard each-->  the best of each range
blocks of queries                       --TopKMerge, a shard each-->          the best of all; for more than one range
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ...data.corpus import Corpus, CorpusOptions, list_files, measure
from ...data.shards import cut_shards, number_shards, remove_tags, tables_of
from ...engine.job import Job, require_complete, run_job, stage_folder
from ...engine.planner import FixedPlanner
from ...engine.run import Run
from ...engine.stage_files import files_of, files_plan, grouped
from ...engine.workers import WorkerOptions, WorkerPlan, WorkerRequest
from ...storage.folder import Folder
from .mappers import (
    PASSAGE_ID,
    PASSAGES,
    QUERIES,
    QUERY_ID,
    RANKING_SCHEMA,
    ExactSearchMapper,
    ScoreCandidatesMapper,
    VectorReader,
    read_ranking,
)
from .top_k_merge import RankedLists, TopKMerge

QUERY_BLOCK = 1024
RANGE_BYTES = 128 << 20  # of vectors in float32; a worker holds some four times as much
COLUMNS = ("id", "embedding", "error")


@dataclass(frozen=True)
class ExactSearch:
    """A search of all passages, or the scoring of candidates.

    queries, passages: outputs of the embed job. k: passages a query. cosine: how vectors are compared, else by inner product.
    candidates: the name of a Parquet file in `folder` with the only pairs to score; None searches everything.
    """

    queries: str
    passages: str
    folder: Folder
    k: int
    cosine: bool
    candidates: str | None
    workers: WorkerOptions

    @property
    def storage(self) -> Mapping[str, Any]:
        return self.folder.options

    def settings(self) -> dict[str, Any]:
        """Everything that fixes the rankings; the folders of the vectors are named after what fixes them."""
        own = {name: getattr(self, name) for name in ("queries", "passages", "k", "cosine", "candidates")}
        return {"job": "exact search", "query_block": QUERY_BLOCK, "range_bytes": RANGE_BYTES} | own


def retrieve(search: ExactSearch, output: Folder) -> Iterator[pa.Table]:
    """Search, or resume the search in `output`; then yield a table of RANKING_SCHEMA for each block of queries, best first.

    Raises RunError when shards failed for good.
    """
    planner = FixedPlanner(lambda: search_plan(search), WorkerRequest(search.workers, weight_bytes=4 * RANGE_BYTES))
    parts = require_complete(run_job(_search_job(search), output, planner), output.url).parts
    blocks = len(_shards_of(_measure(search.queries, search.storage), QUERY_BLOCK, QUERIES))
    if len(parts) > blocks:
        plan = files_plan(grouped(files_of(output, parts), len(parts) // blocks))
        planner = FixedPlanner(lambda: (plan, RANKING_SCHEMA), WorkerRequest(search.workers.on_cpus()))
        merge = TopKMerge(RankedLists(query=(QUERY_ID,), item=PASSAGE_ID, k=search.k), search.storage)
        settings = search.settings() | {"job": "merge of exact searches"}
        output = stage_folder(output, "merged")
        job = Job("merging the ranges", settings, lambda run, workers: merge)
        parts = require_complete(run_job(job, output, planner), output.url).parts
    return (read_ranking(output.path(part.part), output.options) for part in parts)


def search_plan(search: ExactSearch) -> tuple[pa.Table, pa.Schema]:
    """A shard for each block of queries and range of passages, those of one block side by side; and the columns to read.

    The cuts are fixed by the vectors alone, so that the same search has the same shards on any cluster.
    """
    queries, passages = (_measure(url, search.storage) for url in (search.queries, search.passages))
    vectors = passages.schema.field("embedding")
    blocks = _shards_of(queries, QUERY_BLOCK, QUERIES)
    ranges = _shards_of(passages, max(1, RANGE_BYTES // (4 * vectors.type.list_size)), PASSAGES)
    shards = [pa.concat_tables([block, part]) for block in blocks for part in ranges]
    columns = pa.schema([("id", pa.large_string()), vectors, ("error", pa.string())])
    return number_shards(shards), columns


def _search_job(search: ExactSearch) -> Job:
    def mapper(run: Run, workers: WorkerPlan) -> ExactSearchMapper | ScoreCandidatesMapper:
        reader = VectorReader(search.cosine, run.columns, search.storage)
        if search.candidates is not None:
            return ScoreCandidatesMapper(reader, search.k, search.folder, search.candidates)
        return ExactSearchMapper(reader, search.k, workers.threads, workers.device)

    label = "scoring the candidates" if search.candidates else f"exact search for the {search.k:,} nearest"
    return Job(label, search.settings(), mapper)


def _measure(url: str, storage: Mapping[str, Any]) -> Corpus:
    options = CorpusOptions(input=url, text_column="id", keep_columns=COLUMNS[1:])
    return measure(list_files(options, storage), options, storage, strict=True)


def _shards_of(corpus: Corpus, rows: int, source: str) -> list[pa.Table]:
    return tables_of(remove_tags(cut_shards(corpus, rows)), source)

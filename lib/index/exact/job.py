"""A run by exact search: vectors of queries and of passages, as the embed job left them, become a ranking of each query.

blocks of queries x ranges of passages  --Search, a shard each-->  the best of each range
blocks of queries                       --Merge, a shard each-->   the best of all; where there is more than one range
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ...data.corpus import Corpus, CorpusOptions, list_files, measure
from ...data.shards import PLAN_SCHEMA, cut_shards, number_shards, remove_tags, tables_of
from ...engine.job import Job, RunOptions, carry_out_planned, require_complete
from ...engine.parts import Part
from ...engine.run import Run
from ...engine.workers import WorkerPlan
from ...storage.filesystem import absolute, parse_options
from ...storage.folder import Folder
from .mappers import PASSAGES, QUERIES, RUN_SCHEMA, ExactSearchMapper, Merge, ScoreCandidatesMapper, Vectors, read_run

QUERY_BLOCK = 1024
RANGE_BYTES = 128 << 20  # of vectors in float32; a worker holds some four times as much
COLUMNS = ("id", "embedding", "error")


@dataclass(frozen=True)
class ExactSearch:
    """What is searched, and for what. queries, passages: outputs of the embed job. candidates: the name of a Parquet
    file in `folder` with the only pairs to score; None searches everything."""

    queries: str
    passages: str
    folder: Folder
    most: int
    cosine: bool
    candidates: str | None
    options: RunOptions = field(repr=False)  # its `output` is where the run goes

    def settings(self) -> dict[str, Any]:
        """What fixes the run; the vectors' folders are named after what fixes them."""
        named = ("queries", "passages", "most", "cosine", "candidates")
        cuts = {"query_block": QUERY_BLOCK, "range_bytes": RANGE_BYTES}
        return {"verb": "search"} | cuts | {name: getattr(self, name) for name in named}


def retrieve(retrieval: ExactSearch) -> Iterator[pa.Table]:
    """Search, or go on with it, and then the run: a table of RUN_SCHEMA for each block of queries, each query's best first.

    Raises RunError when shards failed for good.
    """
    output = retrieval.options.output
    search = carry_out_planned(_search_job(retrieval), retrieval.options, lambda: search_plan(retrieval))
    parts = require_complete(search, output).parts
    blocks = len(_pieces(_measured(retrieval.queries, retrieval.folder.options), QUERY_BLOCK, QUERIES))
    folder = Folder(absolute(output), retrieval.folder.options)
    if len(parts) > blocks:
        plan = merge_plan(folder, parts, blocks)
        folder = Folder(f"{folder.url}-merged", folder.options)
        options = replace(retrieval.options, output=folder.url)
        parts = require_complete(
            carry_out_planned(_merge_job(retrieval), options, lambda: (plan, RUN_SCHEMA)), folder.url
        ).parts
    return (read_run(folder.path(part.part), folder.options) for part in parts)


def search_plan(retrieval: ExactSearch) -> tuple[pa.Table, pa.Schema]:
    """A shard for each block of queries and range of passages, those of one block side by side; and the columns that are read.

    The cuts are fixed by the vectors alone, so that the same run is cut alike on any cluster.
    """
    queries, passages = (_measured(url, retrieval.folder.options) for url in (retrieval.queries, retrieval.passages))
    vectors = passages.schema.field("embedding")
    blocks = _pieces(queries, QUERY_BLOCK, QUERIES)
    ranges = _pieces(passages, max(1, RANGE_BYTES // (4 * vectors.type.list_size)), PASSAGES)
    shards = [pa.concat_tables([block, part]) for block in blocks for part in ranges]
    columns = pa.schema([("id", pa.large_string()), vectors, ("error", pa.string())])
    return number_shards(shards), columns


def merge_plan(folder: Folder, parts: Sequence[Part], blocks: int) -> pa.Table:
    """A shard for each block of queries: the parts of its ranges."""
    assert len(parts) % blocks == 0, f"{len(parts)} parts of {blocks} blocks"
    ranges, count = len(parts) // blocks, len(parts)
    data = {
        "shard": [number // ranges for number in range(count)],
        "path": [folder.path(part.part) for part in parts],
        "name": [part.part for part in parts],
        "start": [0] * count,
        "stop": [part.rows for part in parts],
        "rows": [part.rows for part in parts],
        "size": [part.bytes for part in parts],
        "tag": [""] * count,  # one that is published again is the same part
        "error": pa.nulls(count, pa.string()),
        "source": pa.nulls(count, pa.string()),
    }
    return pa.table(data, PLAN_SCHEMA)


def _search_job(retrieval: ExactSearch) -> Job:
    storage = parse_options(retrieval.options.storage_option)

    def verb(ledger: Run, workers: WorkerPlan) -> ExactSearchMapper | ScoreCandidatesMapper:
        vectors = Vectors(retrieval.cosine, ledger.columns, storage)
        if retrieval.candidates is not None:
            return ScoreCandidatesMapper(vectors, retrieval.most, retrieval.folder, retrieval.candidates)
        return ExactSearchMapper(vectors, retrieval.most, workers.threads, "cuda" if workers.gpus else "cpu")

    said = "scoring the candidates" if retrieval.candidates else f"exact search for the {retrieval.most:,} nearest"
    return Job(said=said, settings=retrieval.settings(), verb=verb, weight_bytes=4 * RANGE_BYTES)


def _merge_job(retrieval: ExactSearch) -> Job:
    settings = retrieval.settings() | {"verb": "merge"}
    storage = parse_options(retrieval.options.storage_option)
    return Job("merging the ranges", settings, lambda ledger, workers: Merge(retrieval.most, storage))


def _measured(url: str, storage: Mapping[str, Any]) -> Corpus:
    options = CorpusOptions(input=url, text_column="id", keep_columns=COLUMNS[1:])
    return measure(list_files(options, storage), options, storage, strict=True)


def _pieces(corpus: Corpus, rows: int, source: str) -> list[pa.Table]:
    return tables_of(remove_tags(cut_shards(corpus, rows)), source)

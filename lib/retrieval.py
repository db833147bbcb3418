"""A run by exact search: vectors of queries and of passages, as the embed job left them, become a ranking of each query.

    blocks of queries x ranges of passages  --Search, a shard each-->  the best of each range  --merged-->  the best of all

The plan has the shards of one block of queries side by side, so that merging holds one block.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .cluster import Workers
from .corpus import Corpus, CorpusOptions, list_files, measure
from .errors import RunError
from .job import Job, RunOptions, carry_out_planned
from .ledger import Ledger
from .plan import PLAN_SCHEMA, count_shards, cut
from .ranking import best, rank_ids
from .searching import PASSAGE_ID, PASSAGES, QUERIES, QUERY_ID, SCORE, Score, Search, Vectors
from .sharded import Outcome
from .storage import Folder, absolute, parse_options

QUERY_BLOCK = 1024
RANGE_BYTES = 128 << 20  # of vectors in float32; a worker holds some four times as much
COLUMNS = ("id", "embedding", "error")
RUN_SCHEMA = pa.schema([(QUERY_ID, pa.large_string()), (PASSAGE_ID, pa.large_string()), (SCORE, pa.float32())])


@dataclass(frozen=True)
class Retrieval:
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
        return {"verb": "search"} | {name: getattr(self, name) for name in named}


def retrieve(retrieval: Retrieval, say: Callable[[str], None]) -> Iterator[pa.Table]:
    """Search, or go on with it; then, block of queries by block, the run: QUERY_ID, PASSAGE_ID (large_string) and SCORE
    (float32), each query's best first. Raises RunError when shards failed for good."""
    plan, columns = search_plan(retrieval)
    job = search_job(retrieval, columns)
    outcome = whole(carry_out_planned(job, retrieval.options, lambda: (plan, columns), say), retrieval.options.output)
    yield from merged(retrieval, [part.part for part in outcome.parts])


def search_job(retrieval: Retrieval, columns: pa.Schema) -> Job:
    """The job over the shards of `search_plan`."""
    storage = parse_options(retrieval.options.storage_option)

    def verb(ledger: Ledger, workers: Workers) -> Search | Score:
        vectors = Vectors(retrieval.cosine, ledger.columns, storage)
        if retrieval.candidates is not None:
            return Score(vectors, retrieval.folder, retrieval.candidates)
        return Search(vectors, retrieval.most, workers.threads, "cuda" if workers.gpus else "cpu")

    said = "scoring the candidates" if retrieval.candidates else f"exact search for the {retrieval.most:,} nearest"
    return Job(said=said, settings=retrieval.settings(), verb=verb, weight_bytes=4 * RANGE_BYTES)


def search_plan(retrieval: Retrieval) -> tuple[pa.Table, pa.Schema]:
    """A shard for each block of queries and range of passages, and the columns that are read of both."""
    storage = parse_options(retrieval.options.storage_option)
    queries, passages = (_measured(url, storage) for url in (retrieval.queries, retrieval.passages))
    columns = pa.schema([("id", pa.large_string()), passages.schema.field("embedding"), ("error", pa.string())])
    blocks = _pieces(queries, QUERY_BLOCK, QUERIES)
    ranges = _pieces(passages, _range_rows(passages), PASSAGES)
    crossed = [
        _numbered([block, part], i * len(ranges) + j) for i, block in enumerate(blocks) for j, part in enumerate(ranges)
    ]
    return pa.concat_tables(crossed), columns


def merged(retrieval: Retrieval, parts: list[str]) -> Iterator[pa.Table]:
    """The run, from the parts of the shards in order. Memory: two lists of one block of queries."""
    storage = parse_options(retrieval.options.storage_option)
    blocks = len(_pieces(_measured(retrieval.queries, storage), QUERY_BLOCK, QUERIES))
    folder = Folder(absolute(retrieval.options.output), storage)
    ranges = len(parts) // blocks
    for block in range(blocks):
        tables = (_read(folder, name) for name in parts[block * ranges : (block + 1) * ranges])
        yield reduce(lambda left, right: _best_of(left, right, retrieval.most), tables, RUN_SCHEMA.empty_table())


def whole(outcome: Outcome, output: str) -> Outcome:
    """Raises RunError when shards were given up on: a run with holes has no score."""
    for number, reason in outcome.quarantined.items():
        raise RunError(
            f"{len(outcome.quarantined)} shards of {output} failed, the first is {number}: {reason}. Mend the cause and "
            "start the same command again"
        )
    return outcome


def fingerprint(settings: Mapping[str, Any]) -> str:
    """12 hex digits that name a folder after what fixes its content."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _measured(url: str, storage: Mapping[str, Any]) -> Corpus:
    options = CorpusOptions(input=url, text_column="id", keep_columns=COLUMNS[1:])
    return measure(list_files(options, storage), options, storage, strict=True)


def _range_rows(passages: Corpus) -> int:
    """Fixed by the vectors alone, so that the same run is cut alike on any cluster."""
    return max(1, RANGE_BYTES // (4 * passages.schema.field("embedding").type.list_size))


def _pieces(corpus: Corpus, rows: int, source: str) -> list[pa.Table]:
    """The plan of a corpus of vectors, a table a shard, with the source before the names. Parts have no tag: one that is
    published again is the same part."""
    plan = cut(corpus, rows)
    names = [f"{source}/{name}" for name in plan["name"].to_pylist()]
    plan = plan.set_column(plan.schema.get_field_index("name"), "name", pa.array(names, pa.string()))
    plan = plan.set_column(plan.schema.get_field_index("tag"), "tag", pa.array([""] * len(plan), pa.string()))
    return [plan.filter(pc.equal(plan["shard"], number)) for number in range(count_shards(plan))]


def _numbered(pieces: list[pa.Table], number: int) -> pa.Table:
    table = pa.concat_tables(pieces)
    return table.set_column(0, PLAN_SCHEMA.field(0), pa.array([number] * len(table), pa.int64()))


def _read(folder: Folder, name: str) -> pa.Table:
    with folder.open(name) as file:
        return pq.read_table(file, schema=RUN_SCHEMA)


def _best_of(left: pa.Table, right: pa.Table, most: int) -> pa.Table:
    """Of each query of two lists its `most` best."""
    rows = pa.concat_tables([left, right])
    numbered = rows[QUERY_ID].combine_chunks().dictionary_encode()
    ranks, ids = rank_ids(rows[PASSAGE_ID].combine_chunks())
    queries, scores, places = best(numbered.indices.to_numpy().astype(np.int64), rows[SCORE].to_numpy(), ranks, most)
    taken = {
        QUERY_ID: numbered.dictionary.take(pa.array(queries)),
        PASSAGE_ID: ids.take(pa.array(places)),
        SCORE: scores,
    }
    return pa.table(taken)

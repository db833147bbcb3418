"""Candidates become pairs: ids of queries and passages get their texts, however large the corpus is.

Four maps over shards in `OUTPUT/_stages/join-KEY`, each resumable: passages and candidates are partitioned by passage id and
joined; the joined rows and the queries are partitioned by query id, so that a bucket holds whole queries, ready to be scored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..data.corpus import Corpus, CorpusOptions, list_files, measure
from ..data.reader import read_rows
from ..data.shards import Shard, cut_shards, sample_shards
from ..data.texts import compose, parse_template
from ..engine.actor_pool import shared_pool
from ..engine.executor import Outcome
from ..engine.job import Job, require_complete, run_job, stage_folder
from ..engine.join import JoinMapper, PartitionMapper
from ..engine.planner import CorpusPlanner, FixedPlanner
from ..engine.run import Run
from ..engine.shuffle import KEY, MAX_RANGES, REASON, bucket_plan, partition_bytes
from ..engine.workers import WorkerPlan, WorkerRequest
from ..errors import InputError, RunError
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from .config import RerankConfig

CANDIDATES, PASSAGES, PAIRS, QUERIES = "candidates", "passages", "pairs", "queries"
MIN_PAIRS, MAX_PAIRS = 1000, 50_000  # a bucket of queries, in the end a shard of the scoring
PAIR_BUCKETS = 64  # where the pairs are enough, so that all workers have some to the end
SAMPLE_SHARDS, SAMPLE_ROWS = 8, 128
MAX_ROWS = 1_000_000  # a shard that is partitioned: ids are short, and are Python strings in memory
ID_NAMES = ("_id", "id")
Template = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Table:
    """An input of the join. key: the column of its ids; template: its text, empty for candidates; carried: columns kept."""

    name: str
    options: CorpusOptions
    key: str
    template: Template
    carried: tuple[str, ...]
    corpus: Corpus

    @property
    def bytes(self) -> float:
        return self.corpus.rows * self.corpus.row_bytes


def settings(config: RerankConfig) -> dict[str, Any]:
    """Everything that fixes the joined pairs: the three inputs, by their files' names, sizes and tags, and their columns."""
    pairs, candidates, storage = config.pairs, config.candidates, config.run.storage.fsspec
    fixed: dict[str, Any] = {
        "query_column": pairs.query_column,
        "text_column": pairs.text_column,
        "text_template": pairs.text_template,
        "query_id_column": candidates.query_id_column,
        "passage_id_column": candidates.passage_id_column,
        "corpus_id_column": candidates.corpus_id_column,
        "limit": pairs.limit,
        "carried": list(pairs.keep_columns),
    }
    for name, url in {CANDIDATES: pairs.input, PASSAGES: candidates.corpus, QUERIES: candidates.queries}.items():
        fixed[f"{name} files"] = fingerprint(list_files(CorpusOptions(input=str(url)), storage), digits=16)
    return fixed


@shared_pool()
def join(config: RerankConfig) -> tuple[pa.Table, pa.Schema]:
    """Do the join, or the rest of it. The plan of its buckets and their columns, for the scoring.

    Raises InputError for a table without the columns it needs, RunError for a join with shards that failed.
    """
    tables = _tables(config)
    buckets = _buckets(config, tables)
    place = stage_folder(config.run.folder, "join", settings(config), buckets)
    _partition(config, tables[PASSAGES], place, buckets[PASSAGES])
    candidates = _partition(config, tables[CANDIDATES], place, buckets[PASSAGES])
    pairs = _join(config, place, buckets[QUERIES])
    _partition(config, tables[QUERIES], place, buckets[QUERIES])
    rows_in, rows_out = (sum(part.rows for part in outcome.parts) for outcome in (candidates, pairs))
    if rows_in != rows_out:
        raise RunError(f"{rows_in:,} candidates became {rows_out:,} pairs in {place.url}. Delete it and start again")
    return bucket_plan({name: place.below(name) for name in (PAIRS, QUERIES)})


@dataclass(frozen=True)
class SampledPairs:
    """A source of candidates with texts that are like theirs: as many queries as they have, passages in the order of the corpus."""

    corpus: Corpus
    query_id: str
    texts: Mapping[str, list[str]]
    storage: Mapping[str, Any]

    def read(self, shard: Shard) -> tuple[pa.Table, int]:
        table = read_rows(shard, [self.query_id], self.corpus.schema, self.storage)
        queries, passages = self.texts[QUERIES], self.texts[PASSAGES]
        numbers = table[self.query_id].combine_chunks().dictionary_encode().indices.fill_null(0).to_pylist()
        query = pa.array([queries[number % len(queries)] for number in numbers], pa.large_string())
        passage = pa.array([passages[i % len(passages)] for i in range(len(numbers))], pa.large_string())
        reasons = pa.nulls(len(numbers), pa.string())
        texts = {"query": query, "passage": passage, KEY: query, REASON: reasons}
        return pa.table({"id": table["_source"]} | texts), table.num_rows


def sample(config: RerankConfig) -> SampledPairs:
    """Pairs for a dry run, before anything is joined. Raises InputError as `join` does, or where a table has no text."""
    tables, storage = _tables(config), config.run.storage.fsspec
    texts = {}
    for table in (tables[QUERIES], tables[PASSAGES]):
        columns = [name for _, name in table.template]
        shard_rows = max(SAMPLE_ROWS, int(table.corpus.rows / SAMPLE_SHARDS))  # a corpus of any size has few shards
        shards = sample_shards(cut_shards(table.corpus, shard_rows), SAMPLE_SHARDS, SAMPLE_ROWS)
        arrays = (
            compose(read_rows(shard, columns, table.corpus.schema, storage), table.template)[0] for shard in shards
        )
        texts[table.name] = [text for array in arrays for text in array.to_pylist() if text]
        if not texts[table.name]:
            raise InputError(f"no text among the first {table.name} of {table.options.input}")
    return SampledPairs(tables[CANDIDATES].corpus, config.candidates.query_id_column, texts, storage)


def planner_of(config: RerankConfig, weight_bytes: int) -> CorpusPlanner:
    """The candidates in shards of the scoring, for a dry run."""
    options, workers = _tables(config)[CANDIDATES].options, WorkerRequest(config.workers, weight_bytes)
    return CorpusPlanner(options, config.run.storage.fsspec, lambda corpus, count: MAX_PAIRS, workers)


def _tables(config: RerankConfig) -> dict[str, Table]:
    pairs, candidates = config.pairs, config.candidates
    passage_text = pairs.text_template or f"{{{pairs.text_column or 'text'}}}"
    query_text = f"{{{pairs.query_column or 'text'}}}"
    query_id, passage_id = candidates.query_id_column, candidates.passage_id_column
    carried = tuple(dict.fromkeys([query_id, passage_id, *pairs.keep_columns]))
    ids = [candidates.corpus_id_column] if candidates.corpus_id_column else [passage_id, *ID_NAMES]
    return {
        PASSAGES: _table(config, PASSAGES, str(candidates.corpus), ids, passage_text),
        QUERIES: _table(config, QUERIES, str(candidates.queries), [query_id, *ID_NAMES], query_text),
        CANDIDATES: _table(config, CANDIDATES, pairs.input, [passage_id], None, carried),
    }


def _table(
    config: RerankConfig, name: str, url: str, keys: list[str], text: str | None, carried: tuple[str, ...] = ()
) -> Table:
    """Measure one input. keys: names that the column of its ids may have, the likeliest first."""
    options = CorpusOptions(
        input=url,
        text_template=text or f"{{{keys[0]}}}",
        keep_columns=carried,
        limit=None if text else config.pairs.limit,
    )
    storage = config.run.storage.fsspec
    corpus = measure(list_files(options, storage), options, storage, strict=False)
    key = next((key for key in keys if key in corpus.schema.names), None)
    if key is None:
        known = ", ".join(corpus.schema.names)
        raise InputError(f"no column {' or '.join(keys)} in {url} (there: {known}). Name it as in the candidates")
    return Table(name, options, key, tuple(parse_template(text)) if text else (), carried, corpus)


def _buckets(config: RerankConfig, tables: Mapping[str, Table]) -> dict[str, int]:
    """The number of buckets of passages and of queries."""
    passages, pairs = tables[PASSAGES], tables[CANDIDATES].corpus.rows
    joined = pairs * passages.corpus.row_bytes
    all_bytes = passages.bytes + joined
    by_rows = max(pairs / MAX_PAIRS, min(PAIR_BUCKETS, pairs / MIN_PAIRS))
    shard_rows = config.pairs.shard_rows
    by_queries = pairs / shard_rows if shard_rows else max(joined / partition_bytes(joined), by_rows)
    first = max(1, math.ceil(all_bytes / partition_bytes(all_bytes)))
    if first * first > MAX_RANGES:
        raise RunError(
            f"corpus and candidates with their texts are {all_bytes / 2**40:.1f} TiB, {first * first:,} ranges to read; a run "
            f"takes {MAX_RANGES:,}. Cut the corpus in parts, and score each part's candidates in a run of its own"
        )
    return {PASSAGES: first, QUERIES: max(1, math.ceil(min(by_queries, MAX_RANGES / first)))}


def _partition(config: RerankConfig, table: Table, place: Folder, buckets: int) -> Outcome:
    storage = config.run.storage.fsspec

    def mapper(run: Run, workers: WorkerPlan) -> PartitionMapper:
        return PartitionMapper(table.key, table.carried, table.template, buckets, run.columns, storage)

    fixed = {"job": "partition", "key": table.key, "buckets": buckets}
    rows = max(1, min(MAX_ROWS, int(partition_bytes(table.bytes) / max(table.corpus.row_bytes, 1.0))))
    workers = WorkerRequest(config.workers.on_cpus())
    planner = CorpusPlanner(table.options, storage, lambda corpus, count: rows, workers)
    folder = place.below(table.name)
    return require_complete(
        run_job(Job(f"join: partitioning {table.name}", fixed, mapper), folder, planner), folder.url
    )


def _join(config: RerankConfig, place: Folder, buckets: int) -> Outcome:
    storage, query_id = config.run.storage.fsspec, config.candidates.query_id_column

    def mapper(run: Run, workers: WorkerPlan) -> JoinMapper:
        return JoinMapper(CANDIDATES, PASSAGES, "passage", query_id, buckets, run.columns, storage)

    sources = {name: place.below(name) for name in (CANDIDATES, PASSAGES)}
    planner = FixedPlanner(lambda: bucket_plan(sources), WorkerRequest(config.workers.on_cpus()))
    job = Job("join: passages to candidates", {"job": "join", "buckets": buckets}, mapper)
    return require_complete(run_job(job, place.below(PAIRS), planner), place.below(PAIRS).url)

"""Candidates become pairs: ids of queries and passages get their texts, however large the corpus is.

Four maps over shards in `OUTPUT/_join`, each resumable: passages and candidates are dealt by passage id and joined; what
comes of it and the queries are dealt by query id, so that a bucket holds whole queries, ready to be scored.
"""

import json
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
from ..engine.job import Job, RunOptions, carry_out, carry_out_planned, require_complete
from ..engine.join import JoinMapper, PartitionMapper
from ..engine.run import Run
from ..engine.shuffle import KEY, MOST_RANGES, REASON, bucket_plan, piece_bytes
from ..engine.workers import WorkerPlan, beside
from ..errors import InputError, RunError
from ..storage.filesystem import absolute, parse_options
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from .mapper import RerankConfig

CANDIDATES, PASSAGES, PAIRS, QUERIES = "candidates", "passages", "pairs", "queries"
LEAST_PAIRS, MOST_PAIRS = 1000, 50_000  # a bucket of queries, in the end a shard of the scoring
PAIR_BUCKETS = 64  # where the pairs are enough, so that all workers have some to the end
SAMPLE_SHARDS, SAMPLE_ROWS = 8, 128
MOST_ROWS = 1_000_000  # a shard that is dealt: ids are short, and are held as Python strings
ID_NAMES = ("_id", "id")
Template = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Table:
    """An input: its options, the column it is dealt by, what becomes its text, what is carried; and its measures."""

    name: str
    options: RunOptions
    key: str
    template: Template
    carried: tuple[str, ...]
    corpus: Corpus

    @property
    def bytes(self) -> float:
        return self.corpus.rows * self.corpus.row_bytes


def settings(config: RerankConfig) -> dict[str, Any]:
    """What fixes the joined pairs: the three inputs, by their files' names, sizes and tags, and their columns."""
    storage = parse_options(config.storage_option)
    names = (
        "query_column",
        "text_column",
        "text_template",
        "query_id_column",
        "passage_id_column",
        "corpus_id_column",
        "limit",
    )
    found: dict[str, Any] = {name: getattr(config, name) for name in names}
    found["carried"] = list(config.keep_columns)
    for name, url in {CANDIDATES: config.input, PASSAGES: config.corpus, QUERIES: config.queries}.items():
        files = list_files(CorpusOptions(input=str(url)), storage)
        found[f"{name} files"] = fingerprint(files, digits=16)
    return found


@shared_pool()
def join(config: RerankConfig) -> tuple[pa.Table, pa.Schema]:
    """Do the join, or what is left of it. The plan of its buckets and their columns, for the scoring.

    Raises InputError for a table without the columns it needs, RunError for a join of other inputs in the same place.
    """
    tables = _tables(config)
    buckets = _buckets(config, tables)
    _deal(tables[PASSAGES], buckets[PASSAGES])
    candidates = _deal(tables[CANDIDATES], buckets[PASSAGES])
    pairs = _join(config, buckets[QUERIES])
    _deal(tables[QUERIES], buckets[QUERIES])
    wanted, made = (sum(part.rows for part in outcome.parts) for outcome in (candidates, pairs))
    if wanted != made:
        raise RunError(
            f"{wanted:,} candidates became {made:,} pairs in {config.output}/_join. Delete it and start again"
        )
    return bucket_plan({name: _folder(config, name) for name in (PAIRS, QUERIES)})


@dataclass(frozen=True)
class SampledPairs:
    """Candidates with texts that are like theirs: as many queries as they have, passages in the order of the corpus."""

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
    """For an estimate, before anything is joined. Raises InputError as `join` does, or where a table has no text."""
    tables, storage = _tables(config), parse_options(config.storage_option)
    texts = {}
    for table in (tables[QUERIES], tables[PASSAGES]):
        columns = [name for _, name in table.template if name]
        shards = sample_shards(cut_shards(table.corpus, _sample_rows(table)), SAMPLE_SHARDS, SAMPLE_ROWS)
        found = (
            compose(read_rows(shard, columns, table.corpus.schema, storage), table.template)[0] for shard in shards
        )
        texts[table.name] = [text for array in found for text in array.to_pylist() if text]
        if not texts[table.name]:
            raise InputError(f"no text among the first {table.name} of {table.options.input}")
    return SampledPairs(tables[CANDIDATES].corpus, config.query_id_column, texts, storage)


def _sample_rows(table: Table) -> int:
    """Rows a shard, so that the plan of a corpus of any size has few."""
    return max(SAMPLE_ROWS, int(table.corpus.rows / SAMPLE_SHARDS))


def _tables(config: RerankConfig) -> dict[str, Table]:
    passage_text = config.text_template or f"{{{config.text_column or 'text'}}}"
    query_text = f"{{{config.query_column or 'text'}}}"
    query_id, passage_id = config.query_id_column, config.passage_id_column
    carried = tuple(dict.fromkeys([query_id, passage_id, *config.keep_columns]))
    ids = [config.corpus_id_column] if config.corpus_id_column else [passage_id, *ID_NAMES]
    passages = _table(config, PASSAGES, str(config.corpus), ids, passage_text)
    queries = _table(config, QUERIES, str(config.queries), [query_id, *ID_NAMES], query_text)
    return {
        PASSAGES: passages,
        QUERIES: queries,
        CANDIDATES: _table(config, CANDIDATES, config.input, [passage_id], None, carried),
    }


def _table(
    config: RerankConfig, name: str, url: str, keys: list[str], text: str | None, carried: tuple[str, ...] = ()
) -> Table:
    """Measure one input. keys: names that the column of its ids may have, the likeliest first."""
    options = RunOptions(
        input=url,
        output=f"{config.output.rstrip('/')}/_join/{name}",
        text_template=text or f"{{{keys[0]}}}",
        keep_columns=carried,
        limit=None if text else config.limit,
        storage_option=config.storage_option,
        **beside(config),
    )
    storage = parse_options(config.storage_option)
    corpus = measure(list_files(options, storage), options, storage, strict=False)
    key = next((key for key in keys if key in corpus.schema.names), None)
    if key is None:
        there = ", ".join(corpus.schema.names)
        raise InputError(f"no column {' or '.join(keys)} in {url} (there: {there}). Name it as in the candidates")
    return Table(name, options, key, tuple(parse_template(text)) if text else (), carried, corpus)


def _buckets(config: RerankConfig, tables: Mapping[str, Table]) -> dict[str, int]:
    """How many buckets of passages and of queries: decided once, so that a resumed join deals alike."""
    passages, pairs = tables[PASSAGES], tables[CANDIDATES].corpus.rows
    joined = pairs * passages.corpus.row_bytes
    all_bytes = passages.bytes + joined
    by_rows = max(pairs / MOST_PAIRS, min(PAIR_BUCKETS, pairs / LEAST_PAIRS))
    by_queries = pairs / config.shard_rows if config.shard_rows else max(joined / piece_bytes(joined), by_rows)
    first = max(1, math.ceil(all_bytes / piece_bytes(all_bytes)))
    if first * first > MOST_RANGES:
        raise RunError(
            f"corpus and candidates with their texts are {all_bytes / 2**40:.1f} TiB, {first * first:,} ranges to read; a run "
            f"takes {MOST_RANGES:,}. Cut the corpus in parts, and score each part's candidates in a run of its own"
        )
    second = max(1, math.ceil(min(by_queries, MOST_RANGES / first)))
    chosen = {PASSAGES: first, QUERIES: second}
    of, folder = settings(config), _folder(config, "")
    folder.claim("_join.json", json.dumps({"of": of, "buckets": chosen}).encode())
    kept = json.loads(folder.read("_join.json"))
    if kept["of"] != json.loads(json.dumps(of)):
        raise RunError(f"{folder.url} holds a join of other inputs. Delete it, or choose a new --output")
    return kept["buckets"]


def _folder(config: RerankConfig, name: str) -> Folder:
    return Folder(
        absolute(f"{config.output.rstrip('/')}/_join/{name}".rstrip("/")), parse_options(config.storage_option)
    )


def _deal(table: Table, buckets: int) -> Outcome:
    storage = parse_options(table.options.storage_option)

    def verb(ledger: Run, workers: WorkerPlan) -> PartitionMapper:
        return PartitionMapper(table.key, table.carried, table.template, buckets, ledger.columns, storage)

    fixed = {"verb": "deal", "key": table.key, "buckets": buckets}
    job = Job(said=f"join: dealing {table.name}", settings=fixed, verb=verb)
    rows = max(1, min(MOST_ROWS, int(piece_bytes(table.bytes) / max(table.corpus.row_bytes, 1.0))))
    return require_complete(carry_out(job, table.options, lambda corpus, workers: rows), table.options.output)


def _join(config: RerankConfig, buckets: int) -> Outcome:
    storage = parse_options(config.storage_option)
    options = RunOptions(
        input=config.input,
        output=f"{config.output.rstrip('/')}/_join/{PAIRS}",
        storage_option=config.storage_option,
        **beside(config),
    )

    def verb(ledger: Run, workers: WorkerPlan) -> JoinMapper:
        return JoinMapper(CANDIDATES, PASSAGES, "passage", config.query_id_column, buckets, ledger.columns, storage)

    sources = {name: _folder(config, name) for name in (CANDIDATES, PASSAGES)}
    job = Job(said="join: passages to candidates", settings={"verb": "join", "buckets": buckets}, verb=verb)
    return require_complete(carry_out_planned(job, options, lambda: bucket_plan(sources)), options.output)

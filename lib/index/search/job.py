"""Search an index with many queries: texts or vectors in, each query's best passages out, reranked where that is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa

from ...data.corpus import columns_at
from ...data.shards import cut_shards, number_shards, tables_of
from ...engine.executor import Outcome
from ...engine.job import Job, RunOptions, carry_out_planned, refuse_nested, require_complete
from ...engine.run import Run
from ...engine.run_config import read_run_config
from ...engine.workers import WorkerOptions, WorkerPlan
from ...errors import InputError, RunError, UsageError
from ...models.reranker_options import RerankerOptions
from ...reranking import job as rerank_job
from ...reranking.candidates import ID_NAMES
from ...reranking.mapper import RerankConfig
from ...storage.filesystem import absolute
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..build.layout import ROWS, SEGMENTS
from ..build.stage_parts import StageFile, files_of, files_plan
from ..build.vector_source import VectorOptions, VectorSource
from ..exact.mappers import PASSAGE_ID, QUERY_ID
from .filter import read_allowed_ids
from .hits import FOUND_SCHEMA, PASSAGES_AT_ONCE
from .mappers import QUERIES as OF_QUERIES
from .mappers import Gather, SearchSegment
from .query import Opened, QueryVectors, SearchConfig, check_queries, open_index, query_vectors, shared

LEAST_BLOCK, MOST_BLOCK = 4096, 32_768  # queries a shard, where their lists are short: a piece is opened for each
OF_PIECES = "_pieces"  # in the output: each piece's own lists, where there are several pieces
BLOCKS = 32  # of queries, where they are enough: so many workers can search one piece


def search(config: SearchConfig) -> Outcome:
    """Embed the queries if need be, search, rerank if asked. Raises ShoalError before anything scales, for what cannot work."""
    opened = open_index(config)
    _check(config, opened)
    reranked = config.reranker or config.reranker_recipe
    folder = Folder(
        absolute(f"{config.output.rstrip('/')}/_candidates" if reranked else config.output), opened.folder.options
    )
    folder.probe()
    _refuse_another_index(folder, opened)
    allow = read_allowed_ids(config, opened, folder)
    vectors = query_vectors(config, opened)
    check_queries(vectors, opened, config)
    outcome = _found(config, opened, vectors, folder, allow.name)
    if reranked:
        require_complete(outcome, folder.url)
        outcome = rerank_job.rerank(_rerank_config(config, folder.url))
    return replace(outcome, notes=allow.notes)


def _check(config: SearchConfig, opened: Opened) -> None:
    """What can be told without the queries. Raises UsageError."""
    if config.effort and not opened.kind.search_parameter:
        raise UsageError(f"--effort {config.effort}: {opened.card['kind']} searches everything. Leave it out")
    if (config.reranker or config.reranker_recipe) and not config.corpus:
        raise UsageError("--reranker reads the passages' texts: give --corpus, with the ids that the index has")
    refuse_nested(
        config.input, RunOptions(input=config.input, output=config.output, storage_option=config.storage_option)
    )
    if config.reranker or config.reranker_recipe:
        rerank_job.checked(_rerank_config(config, f"{config.output.rstrip('/')}/_candidates"))
        _check_texts(config, opened.folder.options)


def _refuse_another_index(folder: Folder, opened: Opened) -> None:
    """Raises RunError where the output has lists of an index that is another now."""
    record = read_run_config(folder) or read_run_config(folder.below(OF_PIECES))
    then, now = record and record["settings"].get("index"), opened.identity
    if then and then != now:
        raise RunError(
            f"{folder.url} holds lists of an index of {then['vectors']:,} vectors in {then['pieces']:,} pieces, and that at "
            f"{opened.folder.url} has {now['vectors']:,} in {now['pieces']:,} now: it has grown, was made anew, or is another. Lists "
            "of both cannot be mixed: choose a new --output"
        )


def _check_texts(config: SearchConfig, storage: Mapping[str, Any]) -> None:
    """Queries and passages must have texts, under the ids that the search gives them. Raises UsageError or InputError."""
    there = columns_at(absolute(config.input), storage)
    taken = next((name for name in (QUERY_ID, *ID_NAMES) if name in there), None)
    if taken is None or taken != (config.id_column or ("id" if "id" in there else None)):
        advice = f"give --id-column {taken}" if taken else f"name them in a column {' or '.join((QUERY_ID, *ID_NAMES))}"
        raise UsageError(
            f"--reranker seeks a query's text by the ids in {config.input} (there: {', '.join(there)}): {advice}"
        )
    passages = columns_at(str(config.corpus), storage)
    ids = [config.corpus_id_column] if config.corpus_id_column else [PASSAGE_ID, *ID_NAMES]
    for name, url, columns in (
        (config.text_column, config.input, there),
        (config.corpus_text_column, config.corpus, passages),
        (next((name for name in ids if name in passages), ids[-1]), config.corpus, passages),
    ):
        if name not in columns:
            raise InputError(
                f"no column {name!r} in {url} (there: {', '.join(columns)}), and --reranker needs it. Name it with --text-column, "
                "--corpus-text-column or --corpus-id-column"
            )


def _found(config: SearchConfig, opened: Opened, vectors: QueryVectors, folder: Folder, allowed: str | None) -> Outcome:
    card, kind = opened.card, opened.kind
    effort = config.effort or card["advised"]
    if kind.has_lists:
        effort = min(effort, card["lists"])  # faiss's fast-scan loses its way when asked for more lists than there are
    block = block_rows(vectors.corpus.rows, config.top_k)
    firsts = {piece["name"]: (piece["first"], piece["rows"]) for piece in opened.pieces}
    settings = {
        "verb": "search",
        "queries": vectors.url,
        "files": fingerprint([(f.name, f.size, f.tag) for f in vectors.corpus.files]),
        "columns": [vectors.column, vectors.id_column],
        "index": opened.identity,
        "block": block,
        "most": config.top_k,
        "effort": effort,
        "allowed": allowed,
    }

    def verb(ledger: Run, workers: WorkerPlan) -> SearchSegment:
        source = VectorSource(
            vectors.column,
            vectors.id_column,
            (),
            card["dim"],
            card["metric"] == "cosine",
            vectors.about.reasons,
            ledger.columns,
            folder.options,
            vectors.about.ranges,
        )
        rows = opened.folder.below(ROWS)
        given = (source, kind, card["metric"], effort, config.top_k, firsts, rows, folder, allowed, workers.threads)
        return SearchSegment(*given, folder.options)

    many = len(opened.pieces) > 1
    place = folder.below(OF_PIECES) if many else folder
    most = max(piece["bytes"] for piece in opened.pieces)
    said = f"searching {opened.vectors:,} vectors" + (
        f", {kind.search_parameter} {effort}" if kind.search_parameter else ""
    )
    job = Job(said, settings, verb, weight_bytes=most)
    blocks = tables_of(cut_shards(vectors.corpus, block), OF_QUERIES)
    options = _options(config, vectors.url, place)
    outcome = carry_out_planned(job, options, lambda: _plan(vectors, blocks, opened))
    if not many:
        return outcome
    files = files_of(place, require_complete(outcome, place.url).parts)
    groups = [files[number :: len(blocks)] for number in range(len(blocks))]
    merge = Job("merging the pieces' lists", settings | {"verb": "gather"}, _gather(config, folder))
    return carry_out_planned(merge, _options(config, place.url, folder), lambda: (files_plan(groups)[0], FOUND_SCHEMA))


def _gather(config: SearchConfig, folder: Folder) -> Callable[[Run, WorkerPlan], Gather]:
    return lambda ledger, workers: Gather(config.top_k, folder.options)


def block_rows(queries: float, most: int) -> int:
    """Queries a shard: so few that a worker can hold their lists."""
    return max(1, min(MOST_BLOCK, max(LEAST_BLOCK, int(queries) // BLOCKS), PASSAGES_AT_ONCE // most))


def _plan(vectors: QueryVectors, blocks: list[pa.Table], opened: Opened) -> tuple[pa.Table, pa.Schema]:
    """A shard for each piece and block of queries, the blocks of a piece side by side."""
    place = opened.folder.below(SEGMENTS)
    files = [StageFile(place.path(piece["name"]), piece["vectors"], piece["bytes"]) for piece in opened.pieces]
    pieces = tables_of(files_plan([[file] for file in files])[0], SEGMENTS)
    return number_shards([pa.concat_tables([block, piece]) for piece in pieces for block in blocks]), vectors.corpus.schema


def _options(config: SearchConfig, input: str, output: Folder) -> VectorOptions:
    given = {each.name: getattr(config, each.name) for each in fields(WorkerOptions)}
    given |= {"gpus_per_worker": 0.0, "storage_option": config.storage_option}
    return VectorOptions(**given, input=input, output=output.url)


def _rerank_config(config: SearchConfig, found: str) -> RerankConfig:
    reranker = RerankerOptions(model=config.reranker, recipe=config.reranker_recipe)
    return RerankConfig(
        **shared(config),
        **{each.name: getattr(reranker, each.name) for each in fields(RerankerOptions)},
        input=found,
        output=config.output,
        corpus=config.corpus,
        queries=config.input,
        query_column=config.text_column,
        text_column=config.corpus_text_column,
        corpus_id_column=config.corpus_id_column,
        top_k=config.top_k,
    )

"""From a task's data to a ranking of each query: embedded and searched exactly, or reranked, by the jobs' own engine.

Every stage has a folder named after what fixes it, below that of the task's data: the same command goes on where it stopped,
and another evaluation of the same model takes what is there.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.ranking import places_in_query
from ..embedding import job as embed_job
from ..embedding.mapper import EmbedConfig
from ..engine.dry_run import Estimate
from ..engine.executor import Outcome
from ..engine.job import RunOptions, require_complete
from ..engine.mapper import NOT_FINITE
from ..engine.parts import parquet_bytes
from ..engine.stage_log import StageLog
from ..engine.workers import WorkerOptions
from ..errors import InputError
from ..index.exact.job import ExactSearch, retrieve
from ..index.exact.mappers import PASSAGE_ID, QUERY_ID, read_run
from ..reranking import job as rerank_job
from ..reranking.mapper import RerankConfig
from ..storage.filesystem import absolute
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from .config import EvaluateConfig, EvaluatedModels, TaskData, encoder_options, prompts_of, reranker_options
from .dataset import NAMED, Passages
from .metrics import CUTS

log = logging.getLogger("shoal")

QUERIES_FILE, CANDIDATES_FILE = "queries.parquet", "candidates.parquet"
MOST = max(CUTS)  # passages a query that are searched for


def rank_queries(
    config: EvaluateConfig, system: EvaluatedModels, work: TaskData, stages: StageLog
) -> Iterator[pa.Table]:
    """The run, in tables of RUN_SCHEMA that hold whole queries; SCORE is null where a model could not give one."""
    _keep(work)
    if work.dataset.candidates is not None:
        stages.counts["candidates"] = len(work.dataset.candidates)
    if system.encoder is None:
        return _reranked(config, CANDIDATES_FILE, work, stages)
    retrieval = _embedded(config, system, work, stages)
    name = f"best-{config.rerank_top}-of-{retrieval.options.output.rpartition('/')[2]}.parquet"
    if system.reranker and work.folder.exists(name):
        return _reranked(config, name, work, stages)
    with stages.timed("search"):
        run = retrieve(retrieval)
    if system.reranker is None:
        return run
    work.folder.claim(name, parquet_bytes(pa.concat_tables(_first(table, config.rerank_top) for table in run)))
    return _reranked(config, name, work, stages)


def estimates(config: EvaluateConfig, system: EvaluatedModels, work: TaskData) -> Iterator[tuple[str, Estimate]]:
    """What the models would compute for a task, from samples; not the pairs of what is not retrieved yet."""
    _keep(work)
    if system.encoder:
        for name, options in _embed_configs(config, system, work).items():
            yield f"embed {name}", embed_job.dry_run(options)
    elif work.dataset.candidates is not None:
        yield "rerank candidates", rerank_job.dry_run(_rerank_config(config, CANDIDATES_FILE, work))


def embed_options(config: EvaluateConfig, prompt: str, texts: Passages, folder: Folder, name: str) -> EmbedConfig:
    """How texts are embedded, and where: in a folder `name-KEY` that is named after what fixes their vectors."""
    rows = {"input": absolute(texts.url), "id_column": texts.id_column, "text_template": texts.template}
    model = vars(encoder_options(config, prompt=prompt))
    options = EmbedConfig(**(_shared(config) | model | rows), output=folder.path(f"{name}-0"))
    _, _, job = embed_job.prepared(options)
    return replace(options, output=folder.path(f"{name}-{fingerprint(job.settings)}"))


def _embed_configs(config: EvaluateConfig, system: EvaluatedModels, work: TaskData) -> dict[str, EmbedConfig]:
    assert system.encoder
    queries = Passages(work.folder.path(QUERIES_FILE), "id", "{text}")
    texts = {"passages": (work.dataset.passages, work.vectors), "queries": (queries, work.folder)}
    prompts = prompts_of(config, system.encoder, work.task)
    return {name: embed_options(config, prompt, *texts[name], name) for name, prompt in prompts.items()}


def _embedded(config: EvaluateConfig, system: EvaluatedModels, work: TaskData, stages: StageLog) -> ExactSearch:
    """Embed passages and queries, or find them embedded; what is to be searched."""
    places = {}
    for name, options in _embed_configs(config, system, work).items():
        log.info(f"embedding the {name} of {work.task.name}")
        with stages.timed(f"embed {name}"):
            outcome = require_complete(embed_job.embed(options), options.output)
        stages.counts[name] = sum(part.rows for part in outcome.parts)
        _note_errors(name, outcome, Folder(options.output, work.folder.options), stages)
        places[name] = options.output
    retrieval = ExactSearch(
        **places,
        folder=work.folder,
        most=MOST,
        cosine=system.cosine,
        candidates=CANDIDATES_FILE if work.dataset.candidates is not None else None,
        options=RunOptions(**_shared(config), input=work.folder.url, output=""),
    )
    output = work.folder.path(f"search-{fingerprint(retrieval.settings())}")
    return replace(retrieval, options=replace(retrieval.options, output=output))


def _reranked(config: EvaluateConfig, candidates: str, work: TaskData, stages: StageLog) -> Iterator[pa.Table]:
    """The candidates with the reranker's scores."""
    options = _rerank_config(config, candidates, work)
    log.info(f"reranking {candidates.removesuffix('.parquet')} of {work.task.name}")
    with stages.timed("rerank"):
        outcome = require_complete(rerank_job.rerank(options), options.output)
    folder = Folder(options.output, work.folder.options)
    _note_errors("pairs", outcome, folder, stages)
    return (read_run(folder.path(part.part), folder.options) for part in outcome.parts)


def _rerank_config(config: EvaluateConfig, candidates: str, work: TaskData) -> RerankConfig:
    passages = work.dataset.passages
    options = RerankConfig(
        **(_shared(config) | vars(reranker_options(config))),
        input=work.folder.path(candidates),
        output=work.folder.path("rerank-0"),
        queries=work.folder.path(QUERIES_FILE),
        corpus=absolute(passages.url),
        query_column="text",
        text_template=passages.template,
        corpus_id_column=passages.id_column,
    )
    settings = rerank_job.settings(options, rerank_job.checked(options))
    return replace(options, output=work.folder.path(f"rerank-{fingerprint(settings)}"))


def _keep(work: TaskData) -> None:
    """What the models read, beside what they make of it."""
    work.folder.claim(QUERIES_FILE, parquet_bytes(work.dataset.queries))
    if work.dataset.candidates is not None:
        work.folder.claim(CANDIDATES_FILE, parquet_bytes(work.dataset.candidates))


def _shared(config: EvaluateConfig) -> dict[str, Any]:
    """What every stage is told."""
    names = [each.name for each in fields(WorkerOptions)]
    return {name: getattr(config, name) for name in (*names, "token_budget", "storage_option")}


def _note_errors(what: str, outcome: Outcome, folder: Folder, stages: StageLog) -> None:
    """Rows without a vector or score, and rows that were cut. Raises InputError where a model gave what is not a number."""
    reasons: Counter[str] = Counter()
    for part in outcome.parts:
        if part.errors:
            with folder.open(part.part) as file:
                reasons.update(pq.read_table(file, columns=["error"])["error"].drop_null().to_pylist())
    if broken := [reason for reason in reasons if NOT_FINITE in reason]:
        raise InputError(
            f"{reasons[broken[0]]:,} {what}: {broken[0]}, so there is no fair score. Try --dtype float32; else mend the model"
        )
    if reasons:
        named = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(NAMED))
        stages.notes.append(
            f"{reasons.total():,} {what} could not be computed ({named}{'; ...' * (len(reasons) > NAMED)})"
        )
    if truncated := sum(part.truncated for part in outcome.parts):
        stages.notes.append(f"{truncated:,} {what} were cut to the model's length")


def _first(table: pa.Table, most: int) -> pa.Table:
    """The first rows of each query; a run has a query's rows together, best first."""
    queries = table[QUERY_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    return table.filter(pa.array(places_in_query(queries) < most)).select([QUERY_ID, PASSAGE_ID])

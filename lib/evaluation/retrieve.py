"""A ranking of each query from a task's data: texts are embedded and searched exactly, or pairs reranked, by the engine's jobs.

Every stage has a folder named after what fixes it, below that of the task's data: the same command resumes where it stopped, and
another evaluation of the same model reuses the stages.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.corpus import CorpusOptions
from ..data.ranking import places_in_query
from ..embedding import job as embed_job
from ..embedding.config import EmbedConfig
from ..embedding.mapper import NOT_FINITE as VECTOR_NOT_FINITE
from ..engine.dry_run import Estimate
from ..engine.executor import Outcome
from ..engine.job import RunOptions, require_complete, stage_folder
from ..engine.parts import parquet_bytes
from ..engine.stage_log import StageLog
from ..errors import InputError
from ..index.exact.job import ExactSearch, retrieve
from ..index.exact.mappers import PASSAGE_ID, QUERY_ID, read_ranking
from ..reranking import job as rerank_job
from ..reranking.config import CandidateOptions, PairOptions, RerankConfig
from ..reranking.config import settings as rerank_settings
from ..reranking.mapper import NOT_FINITE as SCORE_NOT_FINITE
from ..storage.filesystem import absolute
from ..storage.folder import Folder
from .config import EvaluateConfig
from .dataset import NAMED, Passages
from .metrics import CUTS
from .models import EvaluatedModels, prompts_of, reranker_options
from .task_data import TaskData

log = logging.getLogger("shoal")

QUERIES_FILE, CANDIDATES_FILE = "queries.parquet", "candidates.parquet"
NOT_FINITE = (VECTOR_NOT_FINITE, SCORE_NOT_FINITE)
MAX_CUT = max(CUTS)  # passages a query that the search returns


def rank_queries(
    config: EvaluateConfig, models: EvaluatedModels, data: TaskData, stages: StageLog
) -> Iterator[pa.Table]:
    """The rankings, in tables of RANKING_SCHEMA that hold whole queries; SCORE is null where a model could not give one."""
    _store_texts(data)
    if data.dataset.candidates is not None:
        stages.counts["candidates"] = len(data.dataset.candidates)
    if models.encoder is None:
        return _rerank(config, CANDIDATES_FILE, data, stages)
    search = _embed(config, models, data, stages)
    output = stage_folder(data.folder, "search", search.settings())
    best = f"best-{config.rerank_top}-of-{output.url.rpartition('/')[2]}.parquet"
    if models.reranker and data.folder.exists(best):
        return _rerank(config, best, data, stages)
    with stages.timed("search"):
        rankings = retrieve(search, output)
    if models.reranker is None:
        return rankings
    data.folder.claim(best, parquet_bytes(pa.concat_tables(_first(table, config.rerank_top) for table in rankings)))
    return _rerank(config, best, data, stages)


def estimates(config: EvaluateConfig, models: EvaluatedModels, data: TaskData) -> Iterator[tuple[str, Estimate]]:
    """Size and cost of each stage of a task, from samples; not of pairs that are not retrieved yet."""
    _store_texts(data)
    if models.encoder:
        for name, embedding in _embed_configs(config, models, data).items():
            yield f"embed {name}", embed_job.dry_run(embedding)
    elif data.dataset.candidates is not None:
        yield "rerank candidates", rerank_job.dry_run(_rerank_config(config, CANDIDATES_FILE, data))


def embed_config(config: EvaluateConfig, prompt: str, texts: Passages, folder: Folder, name: str) -> EmbedConfig:
    """The embedding of texts. Its output in `folder` is named after everything that fixes the vectors."""
    corpus = CorpusOptions(input=absolute(texts.url), id_column=texts.id_column, text_template=texts.template)
    run = RunOptions(output=stage_folder(folder, name).url, storage=config.storage)
    model = config.model.with_prompt(prompt)
    return embed_job.as_stage(EmbedConfig(corpus=corpus, run=run, model=model, workers=config.workers), folder, name)


def _embed_configs(config: EvaluateConfig, models: EvaluatedModels, data: TaskData) -> dict[str, EmbedConfig]:
    assert models.encoder
    queries = Passages(data.folder.path(QUERIES_FILE), "id", "{text}")
    texts = {"passages": (data.dataset.passages, data.vectors), "queries": (queries, data.folder)}
    prompts = prompts_of(config, models.encoder, data.task)
    return {name: embed_config(config, prompt, *texts[name], name) for name, prompt in prompts.items()}


def _embed(config: EvaluateConfig, models: EvaluatedModels, data: TaskData, stages: StageLog) -> ExactSearch:
    """Embed passages and queries, unless they are embedded already. Returns the search for them."""
    outputs = {}
    for name, embedding in _embed_configs(config, models, data).items():
        log.info(f"embedding the {name} of {data.task.name}")
        folder = embedding.run.folder
        with stages.timed(f"embed {name}"):
            outcome = require_complete(embed_job.embed(embedding), folder.url)
        stages.counts[name] = sum(part.rows for part in outcome.parts)
        _note_errors(name, outcome, folder, stages)
        outputs[name] = folder.url
    return ExactSearch(
        **outputs,
        folder=data.folder,
        k=MAX_CUT,
        cosine=models.cosine,
        candidates=CANDIDATES_FILE if data.dataset.candidates is not None else None,
        workers=config.workers,
    )


def _rerank(config: EvaluateConfig, candidates: str, data: TaskData, stages: StageLog) -> Iterator[pa.Table]:
    """The candidates with the reranker's scores."""
    reranking = _rerank_config(config, candidates, data)
    folder = reranking.run.folder
    log.info(f"reranking {candidates.removesuffix('.parquet')} of {data.task.name}")
    with stages.timed("rerank"):
        outcome = require_complete(rerank_job.rerank(reranking), folder.url)
    _note_errors("pairs", outcome, folder, stages)
    return (read_ranking(folder.path(part.part), folder.options) for part in outcome.parts)


def _rerank_config(config: EvaluateConfig, candidates: str, data: TaskData) -> RerankConfig:
    passages = data.dataset.passages
    run = RunOptions(output=stage_folder(data.folder, "rerank").url, storage=config.storage)
    draft = RerankConfig(
        pairs=PairOptions(input=data.folder.path(candidates), query_column="text", text_template=passages.template),
        run=run,
        candidates=CandidateOptions(
            queries=data.folder.path(QUERIES_FILE),
            corpus=absolute(passages.url),
            corpus_id_column=passages.id_column,
        ),
        model=reranker_options(config),
        workers=config.workers,
    )
    output = stage_folder(data.folder, "rerank", rerank_settings(draft, rerank_job.resolve(draft)))
    return replace(draft, run=replace(run, output=output.url))


def _store_texts(data: TaskData) -> None:
    """Write queries and candidates as the input of the jobs."""
    data.folder.claim(QUERIES_FILE, parquet_bytes(data.dataset.queries))
    if data.dataset.candidates is not None:
        data.folder.claim(CANDIDATES_FILE, parquet_bytes(data.dataset.candidates))


def _note_errors(what: str, outcome: Outcome, folder: Folder, stages: StageLog) -> None:
    """Note rows without a vector or score, and truncated rows. Raises InputError for a vector or score that is not finite."""
    reasons: Counter[str] = Counter()
    for part in outcome.parts:
        if part.errors:
            with folder.open(part.part) as file:
                reasons.update(pq.read_table(file, columns=["error"])["error"].drop_null().to_pylist())
    if broken := [reason for reason in reasons if reason in NOT_FINITE]:
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


def _first(table: pa.Table, count: int) -> pa.Table:
    """The first rows of each query. A ranking has a query's rows together, best first."""
    queries = table[QUERY_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    return table.filter(pa.array(places_in_query(queries) < count)).select([QUERY_ID, PASSAGE_ID])

"""The driver of the rerank job: every pair of query and passage as a row with its score, exactly once."""

from collections.abc import Callable, Mapping
from typing import Any

from ..data.corpus import Corpus
from ..data.texts import parse_template
from ..engine.dry_run import Estimate, estimate
from ..engine.executor import Outcome
from ..engine.job import Job, even_rows, run_job
from ..engine.lease import parse_slice
from ..engine.planner import CorpusPlanner, FixedPlanner
from ..engine.run import Run
from ..engine.workers import WorkerPlan, WorkerRequest
from ..models.reranker_options import resolve_reranker
from ..models.reranker_spec import RerankSpec
from . import candidates
from .config import RerankConfig, check, settings
from .mapper import RerankMapper
from .pair_sources import CandidateRows, PairRows, PairSource

ROW_BYTES = 16  # score, rank, tokens, truncated
PAIRS_A_SHARD = 50_000  # at most: minutes of a GPU worker's time


def rerank(config: RerankConfig) -> Outcome:
    """Plan or resume, score what is pending, audit. Raises ShoalError before anything scales, for what cannot work."""
    spec = resolve(config)
    if config.candidates.corpus is None:
        job, planner = _pairs(config, spec)
        return run_job(job, config.run.folder, planner)
    sources = candidates.PAIRS, candidates.QUERIES
    storage, workers = config.run.storage.fsspec, WorkerRequest(config.workers, spec.model.weight_bytes)
    job = _job(config, spec, lambda run: CandidateRows(*sources, run.columns, storage), candidates.settings(config))
    return run_job(job, config.run.folder, FixedPlanner(lambda: candidates.join(config), workers))


def dry_run(config: RerankConfig) -> Estimate:
    """The size and cost of a run; nothing is written. Candidates are given texts from the first queries and passages, not
    their own: they are not joined yet. Raises ShoalError as the run itself would."""
    spec = resolve(config)
    if config.candidates.corpus is None:
        job, planner = _pairs(config, spec)
    else:
        sampled = candidates.sample(config)
        job, planner = _job(config, spec, lambda run: sampled), candidates.planner_of(config, spec.model.weight_bytes)
    return estimate(job, config.run.folder, planner, ROW_BYTES)


def resolve(config: RerankConfig) -> RerankSpec:
    """Check the config and read the model's files. Raises UsageError or ModelError for what cannot score pairs."""
    check(config)
    spec = resolve_reranker(config.model)
    spec.pair_format()  # a wrong tokenizer, or too long a prompt, is refused now
    return spec


def _pairs(config: RerankConfig, spec: RerankSpec) -> tuple[Job, CorpusPlanner]:
    """The job over pairs of texts, and their shards."""
    pairs, storage = config.pairs, config.run.storage.fsspec
    template = tuple(parse_template(pairs.text_template or f"{{{pairs.text_column or 'passage'}}}"))

    def source(run: Run) -> PairRows:
        query = pairs.query_column or "query"
        return PairRows(query, template, run.id_column, pairs.keep_columns, run.columns, storage)

    def shard_rows(corpus: Corpus, workers: int) -> int:
        return even_rows(corpus, workers, PAIRS_A_SHARD)

    workers = WorkerRequest(config.workers, spec.model.weight_bytes)
    return _job(config, spec, source), CorpusPlanner(pairs, storage, shard_rows, workers, config.run.strict)


def _job(
    config: RerankConfig, spec: RerankSpec, source: Callable[[Run], PairSource], more: Mapping[str, Any] | None = None
) -> Job:
    def mapper(run: Run, workers: WorkerPlan) -> RerankMapper:
        return RerankMapper(config, spec, source(run), workers.threads, workers.device)

    name, fixed = spec.model.name, settings(config, spec) | dict(more or {})
    return Job(label=name, settings=fixed, mapper=mapper, model=name, shard_slice=parse_slice(config.run.slice))

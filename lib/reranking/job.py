"""The driver of the rerank job: every pair of query and passage as a row with its score, exactly once."""

from collections.abc import Callable
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
        return run_job(pair_job(config, spec), config.run.folder, pair_planner(config, spec))
    workers = WorkerRequest(config.workers, spec.model.weight_bytes)
    planner = FixedPlanner(lambda: candidates.join(config), workers)
    job = _job(config, spec, _candidate_rows, candidates.settings(config))
    return run_job(job, config.run.folder, planner)


def dry_run(config: RerankConfig) -> Estimate:
    """The size and cost of a run; nothing is written. Candidates are given texts from the first queries and passages, not
    their own: they are not joined yet. Raises ShoalError as the run itself would."""
    spec = resolve(config)
    if config.candidates.corpus is None:
        return estimate(pair_job(config, spec), config.run.folder, pair_planner(config, spec), ROW_BYTES)
    sampled = candidates.sample(config)
    job = _job(config, spec, lambda config, run: sampled, {})
    planner = candidates.planner_of(config, spec.model.weight_bytes)
    return estimate(job, config.run.folder, planner, ROW_BYTES)


def resolve(config: RerankConfig) -> RerankSpec:
    """Check the config and read the model's files. Raises UsageError or ModelError for what cannot score pairs."""
    check(config)
    spec = resolve_reranker(config.model)
    spec.pair_format()  # a wrong tokenizer, or too long a prompt, is refused now
    return spec


def pair_job(config: RerankConfig, spec: RerankSpec) -> Job:
    """The job over pairs of texts."""
    return _job(config, spec, _pair_rows, {})


def pair_planner(config: RerankConfig, spec: RerankSpec) -> CorpusPlanner:
    """The shards of pairs of texts."""
    workers = WorkerRequest(config.workers, spec.model.weight_bytes)
    return CorpusPlanner(config.pairs, config.run.storage.fsspec, _pair_shard_rows, workers, config.run.strict)


def _job(
    config: RerankConfig, spec: RerankSpec, source: Callable[[RerankConfig, Run], PairSource], more: dict[str, Any]
) -> Job:
    def mapper(run: Run, workers: WorkerPlan) -> RerankMapper:
        return RerankMapper(
            model=config.model,
            spec=spec,
            source=source(config, run),
            top_k=config.candidates.top_k,
            strict=config.run.strict,
            threads=workers.threads,
            device=workers.device,
        )

    name, fixed = spec.model.name, settings(config, spec) | more
    return Job(label=name, settings=fixed, mapper=mapper, model=name, shard_slice=parse_slice(config.run.slice))


def _pair_rows(config: RerankConfig, run: Run) -> PairRows:
    pairs = config.pairs
    return PairRows(
        query_column=pairs.query_column or "query",
        template=tuple(parse_template(pairs.text_template or f"{{{pairs.text_column or 'passage'}}}")),
        id_column=run.id_column,
        carried=pairs.keep_columns,
        columns=run.columns,
        storage=config.run.storage.fsspec,
    )


def _pair_shard_rows(corpus: Corpus, workers: int) -> int:
    return even_rows(corpus, workers, PAIRS_A_SHARD)


def _candidate_rows(config: RerankConfig, run: Run) -> CandidateRows:
    return CandidateRows(candidates.PAIRS, candidates.QUERIES, run.columns, config.run.storage.fsspec)

"""Rerank: every pair of query and passage as a row with its score, exactly once."""

from collections.abc import Callable
from typing import Any

from ..data.corpus import Corpus, list_files, measure
from ..data.texts import parse_template
from ..engine.dry_run import Estimate, estimate
from ..engine.executor import Outcome
from ..engine.job import Job, carry_out, carry_out_planned, even_rows, refuse_nested
from ..engine.lease import parse_slice
from ..engine.run import Run
from ..engine.shuffle import KEY, REASON, TEXT
from ..engine.workers import WorkerPlan
from ..errors import UsageError
from ..models.reranker_options import resolve_reranker
from ..models.reranker_spec import RerankSpec
from ..storage.filesystem import filesystem, parse_options
from . import candidates
from .mapper import CandidateRows, PairRows, PairSource, RerankConfig, RerankMapper

ROW_BYTES = 16  # score, rank, tokens, truncated
PAIRS_A_SHARD = 50_000  # at most: minutes of a GPU worker's time
RESERVED = {KEY, TEXT, REASON, "id", "query", "passage", "score", "rank", "tokens", "truncated", "error"}


def rerank(config: RerankConfig) -> Outcome:
    """Plan or resume, score what is pending, audit. Raises ShoalError before anything scales, for what cannot work."""
    spec = checked(config)
    if config.corpus is None:
        return carry_out(pair_job(config, spec), config, _pair_shard_rows)
    job = _job(config, spec, _candidate_rows, candidates.settings(config))
    return carry_out_planned(job, config, lambda: candidates.join(config))


def dry_run(config: RerankConfig) -> Estimate:
    """What a run would be; nothing is written. Candidates are given texts from the heads of queries and corpus, not
    their own: they are not joined yet. Raises ShoalError as the run itself would."""
    spec, storage = checked(config), parse_options(config.storage_option)
    if config.corpus is None:
        corpus = measure(list_files(config, storage), config, storage, config.strict)
        return estimate(pair_job(config, spec), config, corpus, _pair_shard_rows, ROW_BYTES)
    sampled = candidates.sample(config)
    job = _job(config, spec, lambda config, ledger: sampled, {})
    return estimate(job, config, sampled.corpus, lambda corpus, workers: candidates.MOST_PAIRS, ROW_BYTES)


def checked(config: RerankConfig) -> RerankSpec:
    """The model's files read. Raises UsageError or ModelError for a model, or options, that cannot score pairs."""
    check(config)
    spec = resolve_reranker(config)
    spec.pair_format()  # what is wrong with the tokenizer, or too long a prompt, is told now
    return spec


def pair_job(config: RerankConfig, spec: RerankSpec) -> Job:
    """The job over pairs of texts."""
    return _job(config, spec, _pair_rows, {})


def check(config: RerankConfig) -> None:
    """Options that cannot go together. Raises UsageError."""
    ids = [config.query_id_column, config.passage_id_column] if config.corpus is not None else []
    if taken := RESERVED & {*config.keep_columns, *ids}:
        raise UsageError(
            f"column {taken.pop()!r}: the output has a column of that name of its own. Rename it in the input"
        )
    if (config.corpus is None) != (config.queries is None):
        raise UsageError(
            "--corpus and --queries go together: candidates are ids of both. Without them, give pairs of texts"
        )
    if config.slice and config.corpus is not None:
        raise UsageError("--slice shares pairs of texts. Candidates are joined first, by one driver: leave it out")
    if config.top_k and config.corpus is None:
        raise UsageError("--top-k needs candidates by id: give --queries and --corpus")
    if config.id_column and config.corpus is not None:
        raise UsageError("--id-column names pairs of texts. Candidates have --query-id-column and --passage-id-column")
    for url in (config.input, config.corpus, config.queries):
        if url is not None:
            refuse_nested(url, config)
    if config.text_template is not None:
        parse_template(config.text_template)


def _job(
    config: RerankConfig, spec: RerankSpec, source: Callable[[RerankConfig, Run], PairSource], more: dict[str, Any]
) -> Job:
    def verb(ledger: Run, workers: WorkerPlan) -> RerankMapper:
        device = "cuda" if workers.gpus else "cpu"
        return RerankMapper(config, spec, source(config, ledger), workers.threads, device)

    name, size = spec.model.name, spec.model.weight_bytes
    share, fixed = parse_slice(config.slice), settings(config, spec) | more
    return Job(said=name, settings=fixed, verb=verb, model=name, weight_bytes=size, share=share)


def _pair_rows(config: RerankConfig, ledger: Run) -> PairRows:
    return PairRows(
        query_column=config.query_column or "query",
        template=tuple(parse_template(config.text_template or f"{{{config.text_column or 'passage'}}}")),
        id_column=ledger.id_column,
        carried=config.keep_columns,
        columns=ledger.columns,
        storage=parse_options(config.storage_option),
    )


def _pair_shard_rows(corpus: Corpus, workers: int) -> int:
    return even_rows(corpus, workers, PAIRS_A_SHARD)


def _candidate_rows(config: RerankConfig, ledger: Run) -> CandidateRows:
    storage = parse_options(config.storage_option)
    return CandidateRows(candidates.PAIRS, candidates.QUERIES, ledger.columns, storage)


def settings(config: RerankConfig, spec: RerankSpec) -> dict[str, Any]:
    """What fixes the rows and their scores. A run with other settings is another run."""
    fs, path = filesystem(config.input, parse_options(config.storage_option))
    model = {f"model {k}": v for k, v in vars(spec.model).items() if k not in ("name", "path", "revision")}
    return model | {
        "verb": "rerank",
        "input": fs.unstrip_protocol(path),
        "query_column": config.query_column,
        "text": config.text_template or config.text_column,
        "id_column": config.id_column,
        "keep_columns": list(config.keep_columns),
        "limit": config.limit,
        "top_k": config.top_k,
        "segments": list(spec.segments),
        "answers": list(spec.answers),
        "activation": spec.activation,
        "pair_tokens": spec.limit,
        "dtype": config.dtype,
        "shard_rows": config.shard_rows,
        "revision": spec.model.revision,
    }

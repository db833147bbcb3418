"""Options of the rerank job, and a refusal of those that cannot go together."""

from dataclasses import dataclass
from typing import Any

from ..cli.options import group, option
from ..data.corpus import CorpusOptions
from ..data.texts import parse_template
from ..engine.job import RunOptions, refuse_nested
from ..engine.shuffle import KEY, REASON, TEXT
from ..engine.workers import WorkerOptions
from ..errors import UsageError
from ..models.reranker_options import RerankerOptions
from ..models.reranker_spec import RerankSpec
from ..storage.filesystem import filesystem

RESERVED = {KEY, TEXT, REASON, "id", "query", "passage", "score", "rank", "tokens", "truncated", "error"}


@dataclass(frozen=True, kw_only=True)
class PairOptions(CorpusOptions):
    """The input: pairs of texts, or candidates as pairs of ids."""

    text_column: str | None = option(  # type: ignore[assignment]
        "Column with the passage. Default: passage; with --corpus, text.", None
    )
    query_column: str | None = option("Column with the query. Default: query; with --queries, text.", None)

    def text_columns(self) -> list[str]:
        passage = super().text_columns() if self.text_template else [self.text_column or "passage"]
        return list(dict.fromkeys([self.query_column or "query", *passage]))


@dataclass(frozen=True, kw_only=True)
class CandidateOptions:
    """The texts of candidates by id, and how many of each query are kept."""

    corpus: str | None = option("Passages by id: the input then holds candidates, ids of query and passage.", None)
    queries: str | None = option("Queries by id, with --corpus.", None)
    query_id_column: str = option("Column with the query's id.", "query_id")
    passage_id_column: str = option("Column with the passage's id.", "passage_id")
    corpus_id_column: str | None = option(
        "Column with the id in --corpus. Default: as in the candidates, else _id or id.", None
    )
    top_k: int | None = option("Rank each query's passages and keep the best N.", None, min=1)


@dataclass(frozen=True, kw_only=True)
class RerankConfig:
    """Options of `jobs/rerank_pairs.py`."""

    pairs: PairOptions
    run: RunOptions
    candidates: CandidateOptions = group(CandidateOptions)
    model: RerankerOptions = group(RerankerOptions)
    workers: WorkerOptions = group(WorkerOptions)


def check(config: RerankConfig) -> None:
    """Raises UsageError for options that cannot go together."""
    pairs, candidates = config.pairs, config.candidates
    by_id = candidates.corpus is not None
    ids = [candidates.query_id_column, candidates.passage_id_column] if by_id else []
    if reserved := RESERVED & {*pairs.keep_columns, *ids}:
        raise UsageError(
            f"column {reserved.pop()!r}: the output has a column of that name of its own. Rename it in the input"
        )
    if by_id != (candidates.queries is not None):
        raise UsageError(
            "--corpus and --queries go together: candidates are ids of both. Without them, give pairs of texts"
        )
    if config.run.slice and by_id:
        raise UsageError("--slice shares pairs of texts. Candidates are joined first, by one driver: leave it out")
    if candidates.top_k and not by_id:
        raise UsageError("--top-k needs candidates by id: give --queries and --corpus")
    if pairs.id_column and by_id:
        raise UsageError("--id-column names pairs of texts. Candidates have --query-id-column and --passage-id-column")
    for url in (pairs.input, candidates.corpus, candidates.queries):
        if url is not None:
            refuse_nested(url, config.run.output, config.run.storage.fsspec)
    if pairs.text_template is not None:
        parse_template(pairs.text_template)


def settings(config: RerankConfig, spec: RerankSpec) -> dict[str, Any]:
    """Everything that fixes the rows and their scores. A run with other settings is another run."""
    pairs = config.pairs
    fs, path = filesystem(pairs.input, config.run.storage.fsspec)
    model = {f"model {k}": v for k, v in vars(spec.model).items() if k not in ("name", "path", "revision")}
    return model | {
        "job": "rerank",
        "input": fs.unstrip_protocol(path),
        "query_column": pairs.query_column,
        "text": pairs.text_template or pairs.text_column,
        "id_column": pairs.id_column,
        "keep_columns": list(pairs.keep_columns),
        "limit": pairs.limit,
        "top_k": config.candidates.top_k,
        "segments": list(spec.segments),
        "query_prompt": spec.query_prompt,
        "answers": list(spec.answers),
        "activation": spec.activation,
        "pair_tokens": spec.limit,
        "dtype": config.model.dtype,
        "shard_rows": pairs.shard_rows,
        "revision": spec.model.revision,
    }

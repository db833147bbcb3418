"""Options of the search job, and what cannot go together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...cli.options import group, option
from ...data.corpus import columns_at
from ...engine.job import RunOptions, refuse_nested, stage_folder
from ...engine.workers import WorkerOptions
from ...errors import InputError, UsageError
from ...models.encoder_options import EncoderOptions
from ...models.reranker_options import RerankerOptions, SecondStageOptions
from ...reranking import job as rerank_job
from ...reranking.candidates import ID_NAMES
from ...reranking.config import CandidateOptions, PairOptions, RerankConfig
from ...storage.filesystem import StorageOptions, absolute
from ...storage.folder import Folder
from ..exact.mappers import PASSAGE_ID, QUERY_ID
from ..kinds import IndexKind, to_spec


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """The queries: texts, or vectors."""

    input: str = option("Queries: texts in any format, or Parquet with vectors; any fsspec URL.")
    text_column: str = option("Column with the queries' texts.", "text")
    vector_column: str = option(
        "Column with the queries' vectors; where there is one, nothing is embedded.", "embedding"
    )
    id_column: str | None = option(
        "Column that names a query. Default: 'id' if there is one, else FILE#POSITION.", None
    )
    query_prompt: str | None = option("Before every query. Default: the recipe's or model's.", None)


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """The passages that a search may return."""

    allow: str | None = option("Only these passages: a file or folder with their ids, in --allow-column.", None)
    allow_column: str = option("Column with the ids in --allow.", "id")


@dataclass(frozen=True, kw_only=True)
class PassageOptions:
    """The texts of passages, for the reranker."""

    corpus: str | None = option("Passages by id, for the reranker.", None)
    corpus_id_column: str | None = option(
        "Column with a passage's id in --corpus. Default: passage_id, else _id, else id.", None
    )
    corpus_text_column: str = option("Column with a passage's text in --corpus.", "text")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of `jobs/search_index.py`."""

    index: str = option("Folder that build_index.py wrote; any fsspec URL.")
    queries: QueryOptions
    output: str = option("Folder for the ranked passages; any fsspec URL. Resumes there.")
    top_k: int = option("Passages a query.", 100, min=1)
    nprobe: int | None = option(
        "Lists that a search scans, of a kind with lists. Default: as the index card advises.", None, min=1
    )
    ef_search: int | None = option(
        "Candidates that a search of hnsw keeps. Default: as the index card advises.", None, min=1
    )
    filter: FilterOptions = group(FilterOptions)
    model: EncoderOptions = group(EncoderOptions)
    second_stage: SecondStageOptions = group(SecondStageOptions)
    passages: PassageOptions = group(PassageOptions)
    storage: StorageOptions = group(StorageOptions)
    workers: WorkerOptions = group(WorkerOptions)

    @property
    def folder(self) -> Folder:
        """The output folder."""
        return Folder(absolute(self.output), self.storage.fsspec)

    @property
    def hits_folder(self) -> Folder:
        """The folder of the search's own hits: the output, or a stage of it where they are reranked."""
        return stage_folder(self.folder, "candidates") if self.second_stage.enabled else self.folder

    def rerank_config(self) -> RerankConfig:
        """The reranking of the hits."""
        return RerankConfig(
            pairs=PairOptions(
                input=self.hits_folder.url,
                query_column=self.queries.text_column,
                text_column=self.passages.corpus_text_column,
            ),
            run=RunOptions(output=self.output, storage=self.storage),
            candidates=CandidateOptions(
                corpus=self.passages.corpus,
                queries=self.queries.input,
                corpus_id_column=self.passages.corpus_id_column,
                top_k=self.top_k,
            ),
            model=RerankerOptions(
                model=self.second_stage.reranker,
                recipe=self.second_stage.reranker_recipe,
                token_budget=self.model.token_budget,
            ),
            workers=self.workers,
        )


def check(config: SearchConfig, kind: IndexKind) -> None:
    """Raises UsageError or InputError for options that fit neither each other nor the kind of index. Reads no query."""
    _check_search_parameter(config, kind)
    if config.second_stage.enabled and not config.passages.corpus:
        raise UsageError("--reranker reads the passages' texts: give --corpus, with the ids that the index has")
    refuse_nested(config.queries.input, config.output, config.storage.fsspec)
    if config.second_stage.enabled:
        rerank_job.resolve(config.rerank_config())
        _check_texts(config, config.storage.fsspec)


def resolve_search_parameter(config: SearchConfig, card: Mapping[str, Any], kind: IndexKind) -> int:
    """The nprobe or efSearch of a search: the command's, else as the card advises; 0 for exact search."""
    value = config.nprobe or config.ef_search or card["advised_value"]
    return min(value, card["lists"]) if kind.has_lists else value  # faiss's fast-scan fails for more lists than exist


def _check_search_parameter(config: SearchConfig, kind: IndexKind) -> None:
    """Raises UsageError for a search parameter of another kind of index."""
    options = {"nprobe": ("--nprobe", config.nprobe), "efSearch": ("--ef-search", config.ef_search)}
    for name, (flag, value) in options.items():
        if value is None or name == kind.search_parameter:
            continue
        if not kind.search_parameter:
            raise UsageError(f"{flag} {value}: {to_spec(kind)} searches everything. Leave it out")
        right, _ = options[kind.search_parameter]
        raise UsageError(f"{flag} {value}: a search of {to_spec(kind)} has {right} instead. Write {right} {value}")


def _check_texts(config: SearchConfig, storage: Mapping[str, Any]) -> None:
    """Raises UsageError or InputError unless queries and passages have texts, under the ids that the search writes."""
    queries, options = config.queries, config.passages
    columns = columns_at(absolute(queries.input), storage)
    joined = next((name for name in (QUERY_ID, *ID_NAMES) if name in columns), None)
    if joined is None or joined != (queries.id_column or ("id" if "id" in columns else None)):
        advice = (
            f"give --id-column {joined}" if joined else f"name them in a column {' or '.join((QUERY_ID, *ID_NAMES))}"
        )
        raise UsageError(
            f"--reranker seeks a query's text by the ids in {queries.input} (there: {', '.join(columns)}): {advice}"
        )
    passages = columns_at(str(options.corpus), storage)
    ids = [options.corpus_id_column] if options.corpus_id_column else [PASSAGE_ID, *ID_NAMES]
    for name, url, known in (
        (queries.text_column, queries.input, columns),
        (options.corpus_text_column, options.corpus, passages),
        (next((name for name in ids if name in passages), ids[-1]), options.corpus, passages),
    ):
        if name not in known:
            raise InputError(
                f"no column {name!r} in {url} (there: {', '.join(known)}), and --reranker needs it. Name it with --text-column, "
                "--corpus-text-column or --corpus-id-column"
            )

"""The queries of a search as vectors in the space of the index: read from files, or embedded with the index's model."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ...data.corpus import Corpus, CorpusOptions, RowOptions, columns_at, list_files, measure
from ...data.reader import read_rows
from ...data.shards import cut_shards, shards
from ...data.texts import as_text
from ...data.unique_ids import check_unique_ids
from ...embedding import job as embed_job
from ...embedding.config import EmbedConfig
from ...engine.job import RunOptions, require_complete
from ...errors import InputError, ModelError, UsageError
from ...models.encoder_options import EncoderOptions, ResolvedEncoder, prompt_of, resolve_encoder
from ...recipes import QUERY
from ...storage.filesystem import absolute
from ..build.vector_source import ENCODING, VectorFormat, VectorSource, describe
from .config import SearchConfig
from .opened_index import OpenedIndex

log = logging.getLogger("shoal")

IDS_AT_ONCE = 100_000  # rows of ids that are read


@dataclass(frozen=True)
class QueryVectors:
    """Files with the queries' vectors: their format, their rows, and the columns with vectors and ids."""

    url: str
    format: VectorFormat
    corpus: Corpus
    column: str
    id_column: str | None

    def source(self, index: OpenedIndex, columns: pa.Schema) -> VectorSource:
        """A reader of the vectors, for this index. columns: all columns of the files."""
        return VectorSource(
            column=self.column,
            id_column=self.id_column,
            keep_columns=(),
            format=self.format,
            normalize=index.card["metric"] == "cosine",
            columns=columns,
            storage=index.folder.options,
        )


def query_vectors(config: SearchConfig, index: OpenedIndex) -> QueryVectors:
    """Embed the queries where they are texts. Raises InputError for queries without a row, with repeated ids, or with vectors that
    cannot be compared with the index's; ModelError for another model than the index's."""
    queries, storage = config.queries, config.storage.fsspec
    url, id_column, column = absolute(queries.input), queries.id_column, queries.vector_column
    if column not in columns_at(url, storage):
        embedding = embed_config(config, index)
        _check_ids(_measure(embedding.corpus, storage, strict=False), queries.input, storage)
        log.info("embedding the queries")
        require_complete(embed_job.embed(embedding), embedding.run.output)
        url, id_column, column = embedding.run.folder.url, "id", "embedding"
    corpus = _measure(RowOptions(input=url, id_column=id_column, keep_columns=(column,)), storage, strict=True)
    if not corpus.rows:
        raise InputError(f"{queries.input} has no rows: nothing to search for. Give it queries, or correct --input")
    _check_ids(corpus, queries.input, storage)
    vectors = QueryVectors(url, describe(corpus.files, column, storage), corpus, column, corpus.id_column)
    _check_format(vectors.format, index, queries.input)
    return vectors


def embed_config(config: SearchConfig, index: OpenedIndex) -> EmbedConfig:
    """The embedding of the queries with the index's model. Raises ModelError where the command names another model."""
    queries = config.queries
    options, encoder = resolve_query_encoder(config, index)
    corpus = CorpusOptions(
        input=absolute(queries.input),
        text_template=f"{{{queries.text_column}}}",  # a recipe's own template is of passages
        id_column=queries.id_column,
    )
    run = RunOptions(output=config.output, storage=config.storage)
    model = options.with_prompt(prompt_of(encoder, queries.query_prompt, (QUERY,)))
    embedding = EmbedConfig(corpus=corpus, run=run, model=model, workers=config.workers)
    return embed_job.as_stage(embedding, config.folder, "queries")


def resolve_query_encoder(config: SearchConfig, index: OpenedIndex) -> tuple[EncoderOptions, ResolvedEncoder]:
    """The encoder of the queries, compared with the card. Raises ModelError where the two differ."""
    dim = index.card["dim"]
    options = _encoder_options(config, index)
    encoder = resolve_encoder(options.with_prompt(None))
    if options.truncate_dim is None and encoder.spec.dim > dim:
        options = replace(options, truncate_dim=dim)
        encoder = resolve_encoder(options.with_prompt(None))
    spec = encoder.spec
    facts = {
        "revision": spec.revision,
        "pooling": list(spec.pooling),
        "dim": spec.dim,
        "normalized": spec.normalize,
        "bidirectional": spec.bidirectional,
        "append_eos": spec.append_eos,
    }
    if difference := _difference({"dim": dim} | dict(index.encoder), facts):
        raise ModelError(
            f"{spec.name} is not the model of the index ({difference}). Its vectors cannot be compared: use "
            f"{index.encoder.get('model')}, or build an index of this model's vectors"
        )
    return options, encoder


def _encoder_options(config: SearchConfig, index: OpenedIndex) -> EncoderOptions:
    """The options of the command; those that it leaves out are of the index's vectors."""
    options, encoder = config.model, index.encoder
    if options.model is None and options.recipe is None:
        if not encoder.get("model"):
            raise UsageError(
                "the index does not know which model made its vectors, and the queries are texts. Give --model, or a "
                f"--vector-column with their vectors (none is called {config.queries.vector_column!r})"
            )
        options = replace(options, model=encoder["model"])
    if options.max_tokens is None:
        options = replace(options, max_tokens=encoder.get("max_tokens"))
    if options.recipe is None and encoder.get("recipe"):
        options = replace(options, recipe=encoder["recipe"])
    if options.pooling is None and options.recipe is None and len(encoder.get("pooling", ())) == 1:
        options = replace(options, pooling=encoder["pooling"][0])
    return options


def _check_format(format: VectorFormat, index: OpenedIndex, url: str) -> None:
    """Raises InputError for vectors that cannot be compared with the index's."""
    dim, difference = index.card["dim"], _difference(index.encoder, format.encoder)
    if format.dim != dim or difference:
        raise InputError(
            f"queries at {url} are vectors of {format.encoder.get('model', 'a model unknown')} in {format.dim} dimensions, "
            f"the index's are of {index.encoder.get('model', 'a model unknown')} in {dim}"
            f"{f' ({difference})' if difference else ''}. Embed them with the index's model"
        )


def _difference(index: Mapping[str, Any], queries: Mapping[str, Any]) -> str:
    """The differences between the encoders of index and queries, of the facts that both have, in words."""
    differing = [name for name in ENCODING if name in index and name in queries and index[name] != queries[name]]
    return "; ".join(f"{name}: {queries[name]!r}, the index {index[name]!r}" for name in differing)


def _measure(options: RowOptions, storage: Mapping[str, Any], strict: bool) -> Corpus:
    return measure(list_files(options, storage), options, storage, strict)


def _check_ids(corpus: Corpus, url: str, storage: Mapping[str, Any]) -> None:
    """Raises InputError for an id of several queries: their hits could not be told apart. Reads all ids."""
    name = corpus.id_column
    if name is None:
        return

    def chunks() -> Iterator[pa.Array]:
        for shard in shards(cut_shards(corpus, IDS_AT_ONCE)):
            yield as_text(read_rows(shard, [name], corpus.schema, storage)[name])[0].drop_null()

    check_unique_ids(chunks, "query", url)

"""What a search of an index is told: the index, and the queries as vectors that can be held against its own."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyarrow as pa

from ...data.corpus import Corpus, CorpusOptions, columns_at, list_files, measure
from ...data.reader import read_rows
from ...data.shards import cut_shards, shards
from ...data.texts import as_text
from ...data.unique_ids import check_unique_ids
from ...embedding import job as embed_job
from ...embedding.mapper import EmbedConfig
from ...engine.job import require_complete
from ...engine.parts import MANIFEST as PARTS
from ...engine.parts import read_manifest
from ...engine.workers import WorkerOptions
from ...errors import InputError, ModelError, UsageError
from ...models.encoder_options import EncoderOptions, ModelOptions, ResolvedEncoder, prompt_of, resolve_encoder
from ...recipes import QUERY, RerankRecipe, names
from ...storage.filesystem import absolute, parse_options
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..build.layout import CARD, MANIFEST, ROWS, SEGMENTS
from ..build.segments_job import segments_of
from ..build.vector_source import ENCODING, VectorFormat, VectorOptions, describe
from ..kinds import IndexKind, parse

log = logging.getLogger("shoal")

IDS_AT_ONCE = 100_000  # that are read


@dataclass(frozen=True, kw_only=True)
class SearchConfig(EncoderOptions, WorkerOptions):
    """Everything `jobs/search_index.py` can be told."""

    index: str = field(metadata={"help": "Folder that build_index.py wrote; any fsspec URL."})
    input: str = field(metadata={"help": "Queries: texts in any format, or Parquet with vectors; any fsspec URL."})
    output: str = field(metadata={"help": "Folder for the found passages; any fsspec URL. Resumes there."})
    top_k: int = field(default=100, metadata={"help": "Passages a query.", "min": 1})
    effort: int | None = field(
        default=None, metadata={"help": "nprobe, or efSearch of hnsw. Default: as the index card advises.", "min": 1}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the queries' texts."})
    vector_column: str = field(
        default="embedding",
        metadata={"help": "Column with the queries' vectors; where there is one, nothing is embedded."},
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Column that names a query. Default: 'id' if there is one, else FILE#POSITION."}
    )
    query_prompt: str | None = field(
        default=None, metadata={"help": "Before every query. Default: the recipe's or model's."}
    )
    allow: str | None = field(
        default=None, metadata={"help": "Only these passages: a file or folder with their ids, in --allow-column."}
    )
    allow_column: str = field(default="id", metadata={"help": "Column with the ids in --allow."})
    reranker: str | None = field(default=None, metadata={"help": "Reranker directory or hub id for what was found."})
    reranker_recipe: str | None = field(
        default=None, metadata={"help": f"Published reranker: {', '.join(names(RerankRecipe))}."}
    )
    corpus: str | None = field(default=None, metadata={"help": "Passages by id, for the reranker."})
    corpus_id_column: str | None = field(
        default=None,
        metadata={"help": "Column with a passage's id in --corpus. Default: passage_id, else _id, else id."},
    )
    corpus_text_column: str = field(default="text", metadata={"help": "Column with a passage's text in --corpus."})
    token_budget: int | None = field(
        default=None, metadata={"help": "Tokens a batch. Default: 1024 on CPUs, by model size on GPUs.", "min": 1}
    )
    storage_option: tuple[str, ...] = field(
        default=(),
        metadata={"help": "fsspec option, as endpoint_url=http://host:9000. Repeat it for more.", "many": True},
    )


@dataclass(frozen=True)
class Opened:
    """A finished index: its card, and the pieces that its manifest names."""

    folder: Folder
    card: Mapping[str, Any]
    pieces: tuple[Mapping[str, Any], ...]

    @property
    def kind(self) -> IndexKind:
        return parse(self.card["kind"])

    @property
    def vectors(self) -> int:
        return sum(piece["vectors"] for piece in self.pieces)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this index from any other, and from itself before it grew."""
        names = sorted(piece["name"] for piece in self.pieces)
        return {"vectors": self.vectors, "pieces": len(names), "names": fingerprint(names)}


def open_index(config: SearchConfig) -> Opened:
    """Raises InputError where there is no finished index, or not the whole of it."""
    folder = Folder(absolute(config.index), parse_options(config.storage_option))
    try:
        card, manifest = (json.loads(folder.read(name)) for name in (CARD, MANIFEST))
    except FileNotFoundError as error:
        raise InputError(
            f"no finished index at {folder.url}: it has no {CARD}. Start the command again that builds it, or correct --index"
        ) from error
    opened = Opened(folder, card, tuple(segments_of(manifest)))
    _refuse_gaps(opened)
    return opened


def _refuse_gaps(opened: Opened) -> None:
    """Raises InputError for files of the index that are gone or not whole, by a listing of each of its folders."""
    rows, pieces = (opened.folder.below(name) for name in (ROWS, SEGMENTS))
    parts = {part.part: part.bytes for part in read_manifest(rows)} or {PARTS: -1}
    for folder, wanted in ((pieces, {piece["name"]: piece["bytes"] for piece in opened.pieces}), (rows, parts)):
        there = folder.list()
        if lost := sorted(name for name, size in wanted.items() if there.get(name) != size):
            raise InputError(
                f"{len(lost):,} of {len(wanted):,} files of the index in {folder.url} are gone or not whole, {lost[0]} the first. "
                "Delete what is left of them and start the command again that built the index: it makes them anew"
            )


@dataclass(frozen=True)
class QueryVectors:
    """Where they lie: the files, the column, and the column of their ids."""

    url: str
    about: VectorFormat
    corpus: Corpus
    column: str
    id_column: str | None


def query_vectors(config: SearchConfig, opened: Opened) -> QueryVectors:
    storage, url, id_column = opened.folder.options, absolute(config.input), config.id_column
    column = config.vector_column
    if column not in columns_at(url, storage):
        given = _embed_config(config, opened)
        _refuse_twice(_measured(given, storage, strict=False), config.input, storage)
        log.info("embedding the queries")
        require_complete(embed_job.embed(given), given.output)
        url, column, id_column = given.output, "embedding", "id"
    options = VectorOptions(input=url, output=config.output, id_column=id_column, keep_columns=(column,))
    corpus = _measured(options, storage, strict=True)
    if not corpus.rows:
        raise InputError(
            f"{config.input} has no rows: there is nothing to search for. Give it queries, or correct --input"
        )
    _refuse_twice(corpus, config.input, storage)
    return QueryVectors(url, describe(corpus.files, column, storage), corpus, column, corpus.id_column)


def _measured(options: CorpusOptions, storage: Mapping[str, Any], strict: bool) -> Corpus:
    return measure(list_files(options, storage), options, storage, strict)


def _refuse_twice(corpus: Corpus, url: str, storage: Mapping[str, Any]) -> None:
    """Raises InputError for an id of several queries: what is found could not be told apart. All ids are read."""
    name = corpus.id_column
    if name is None:
        return

    def pieces() -> Iterator[pa.Array]:
        for shard in shards(cut_shards(corpus, IDS_AT_ONCE)):
            yield as_text(read_rows(shard, [name], corpus.schema, storage)[name])[0].drop_null()

    check_unique_ids(pieces, "query", url)


def _embed_config(config: SearchConfig, opened: Opened) -> EmbedConfig:
    """The queries as the index's model encodes them. Raises ModelError where another model is asked for."""
    model, encoding = encoding_of(config, opened)
    options = EmbedConfig(
        **vars(model),
        **shared(config),
        prompt=prompt_of(encoding, config.query_prompt, (QUERY,)),
        input=absolute(config.input),
        text_template=f"{{{config.text_column}}}",  # a recipe's own is of passages
        id_column=config.id_column,
        output=config.output,
    )
    _, _, job = embed_job.prepared(options)
    return replace(options, output=absolute(f"{config.output.rstrip('/')}/_queries-{fingerprint(job.settings)}"))


def _model(config: SearchConfig, opened: Opened) -> EncoderOptions:
    """The command's model, or the card's; encoded as the card's vectors were, but for what the command says."""
    options = EncoderOptions(**{name: getattr(config, name) for name in EncoderOptions.__dataclass_fields__})
    made = opened.card["made"]
    if options.model is None and options.recipe is None:
        if not made.get("model"):
            raise UsageError(
                "the index does not know which model made its vectors, and the queries are texts. Give --model, or a "
                f"--vector-column with their vectors (none is called {config.vector_column!r})"
            )
        options = replace(options, model=made["model"])
    if options.max_tokens is None:
        options = replace(options, max_tokens=made.get("max_tokens"))
    if options.recipe is None and made.get("recipe"):
        options = replace(options, recipe=made["recipe"])
    if options.pooling is None and options.recipe is None and len(made.get("pooling", ())) == 1:
        options = replace(options, pooling=made["pooling"][0])
    return options


def encoding_of(config: SearchConfig, opened: Opened) -> tuple[EncoderOptions, ResolvedEncoder]:
    """The model read and held against the card. Raises ModelError where they are at odds."""
    card, made = opened.card, opened.card["made"]
    options = _model(config, opened)
    encoding = resolve_encoder(ModelOptions(**vars(options)))
    if options.truncate_dim is None and encoding.spec.dim > card["dim"]:
        options = replace(options, truncate_dim=card["dim"])
        encoding = resolve_encoder(ModelOptions(**vars(options)))
    spec = encoding.spec
    found = {"revision": spec.revision, "pooling": list(spec.pooling), "dim": spec.dim, "normalized": spec.normalize}
    found |= {"bidirectional": spec.bidirectional, "append_eos": spec.append_eos}
    if said := _at_odds({"dim": card["dim"]} | dict(made), found):
        raise ModelError(
            f"{spec.name} is not the model of the index ({said}). Its vectors cannot be compared: use {made.get('model')}, or build "
            "an index of this model's vectors"
        )
    return options, encoding


def _at_odds(index: Mapping[str, Any], queries: Mapping[str, Any]) -> str:
    """How queries were made otherwise than the index's vectors, of what both tell, in words."""
    differing = [name for name in ENCODING if name in index and name in queries and index[name] != queries[name]]
    return "; ".join(f"{name}: {queries[name]!r}, the index {index[name]!r}" for name in differing)


def check_queries(vectors: QueryVectors, opened: Opened, config: SearchConfig) -> None:
    """Raises InputError for vectors that cannot be held against the index's."""
    card, made, theirs = opened.card, opened.card["made"], vectors.about.made
    said = _at_odds(made, theirs)
    if vectors.about.dim != card["dim"] or said:
        raise InputError(
            f"queries at {config.input} are vectors of {theirs.get('model', 'a model unknown')} in {vectors.about.dim} dimensions, "
            f"the index's are of {made.get('model', 'a model unknown')} in {card['dim']}{f' ({said})' if said else ''}. Embed them "
            "with the index's model"
        )


def shared(config: SearchConfig) -> dict[str, Any]:
    given = [each.name for each in fields(WorkerOptions)]
    return {name: getattr(config, name) for name in (*given, "token_budget", "storage_option")}

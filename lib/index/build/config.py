"""What an index build is told, and what is read and decided before anything is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from ...data.corpus import Corpus, list_files, measure
from ...engine.job import refuse_nested
from ...engine.run_config import check_same_settings, create_run_config, read_run_config
from ...engine.workers import CpuWorkerOptions
from ...errors import InputError, UsageError
from ...storage.filesystem import absolute, filesystem, parse_options
from ...storage.folder import Folder
from ..kinds import IndexKind, Metric, names, parse, to_spec
from .choose_kind import AUTO, IndexPlan, choose
from .layout import CARD, CODE, LIST, MANIFEST, ROWS, SEGMENTS, STAGES, TRAINED, VECTOR
from .vector_source import VectorOptions, Vectors, check_ids, describe, unlike

RESERVED = {"id", LIST, CODE, "error"}
EXPORTS = ("centroids", "milvus", "pinecone", "lance")


@dataclass(frozen=True, kw_only=True)
class IndexConfig(CpuWorkerOptions):
    """Everything `jobs/build_index.py` can be told."""

    input: str = field(
        default="", metadata={"help": "Vectors: embed_corpus.py's output, or any Parquet; any fsspec URL."}
    )
    output: str = field(
        default="", metadata={"help": "Folder for the index; any fsspec URL. The same command resumes there."}
    )
    kind: str = field(default=AUTO, metadata={"help": f"auto, or one of {', '.join(names())}; as ivf-rabitq:bits=2."})
    lists: int | None = field(
        default=None, metadata={"help": "Inverted lists. Default: near 4 times the square root of the rows.", "min": 1}
    )
    memory: str | None = field(
        default=None, metadata={"help": "What the index may take while it serves, as 64GB; auto keeps to it."}
    )
    recall: float = field(default=0.9, metadata={"help": "recall@10 that is wanted: for auto, and for the advice."})
    metric: Metric = field(
        default="cosine", metadata={"help": "cosine: every vector's length is made 1. ip: inner product. l2: distance."}
    )
    vector_column: str = field(default="embedding", metadata={"help": "Column with the vectors."})
    id_column: str | None = field(
        default=None, metadata={"help": "Column that names a row. Default: 'id' if there is one, else FILE#POSITION."}
    )
    keep_columns: tuple[str, ...] = field(default=(), metadata={"help": "Columns kept beside the ids, by commas."})
    limit: int | None = field(default=None, metadata={"help": "Only the first N rows.", "min": 1})
    sample_rows: int | None = field(
        default=None, metadata={"help": "Vectors to train on. Default: 50 a list.", "min": 1}
    )
    queries: str | None = field(
        default=None,
        metadata={"help": "Vectors of queries to measure recall with. Default: vectors held out of the sample."},
    )
    recall_queries: int = field(default=1000, metadata={"help": "Queries that recall is measured with.", "min": 1})
    min_recall: float | None = field(
        default=None, metadata={"help": "End with an error where recall@10 is lower at every effort; the index stays."}
    )
    merge: int | None = field(
        default=None, metadata={"help": "Also merge the pieces on disk into N indexes of about equal size.", "min": 1}
    )
    exports: tuple[str, ...] = field(default=(), metadata={"help": f"Also write, by commas: {', '.join(EXPORTS)}."})
    shard_rows: int | None = field(
        default=None, metadata={"help": "Rows a shard of the encoding. Default: about 64 MiB of vectors.", "min": 1}
    )
    storage_option: tuple[str, ...] = field(
        default=(),
        metadata={"help": "fsspec option, as endpoint_url=http://host:9000. Repeat it for more.", "many": True},
    )
    dry_run: bool = field(default=False, metadata={"help": "Print kind, sizes, memory and time by stage, and stop."})
    suppose: str | None = field(
        default=None, metadata={"help": "With --dry-run: a corpus of ROWSxDIM, as 1000000000x1024, instead of --input."}
    )
    price_per_hour: float | None = field(default=None, metadata={"help": "Dollars a worker-hour, for --dry-run."})


@dataclass(frozen=True)
class IndexBuild:
    """An opened build. rows: vectors at its first command, which kind and lists were chosen for. `choice` is as it was then, and so
    is `held`: how many vectors the sample leaves out to ask for."""

    config: IndexConfig
    folder: Folder
    vectors: Vectors
    choice: IndexPlan
    rows: int
    held: int
    id_column: str | None
    key: str

    @property
    def storage(self) -> dict[str, Any]:
        return self.folder.options

    @property
    def kind(self) -> IndexKind:
        return self.choice.kind

    def stage(self, name: str) -> Folder:
        return self.folder.below(f"{STAGES}/{name}")

    def options(self, input: str, output: Folder, **more: Any) -> VectorOptions:
        """How a stage runs: on CPUs, wherever there are some."""
        shared = {each.name: getattr(self.config, each.name) for each in fields(CpuWorkerOptions)}
        shared |= {"gpus_per_worker": 0.0, "storage_option": self.config.storage_option}
        return VectorOptions(**(shared | more), input=input, output=output.url)


def open_index_build(config: IndexConfig) -> IndexBuild:
    """Read the input's footers; start the build, or take up the one that is there. Raises ShoalError, within seconds."""
    check(config)
    folder = Folder(absolute(config.output), parse_options(config.storage_option))
    folder.probe()
    options = corpus_options(config)
    files = list_files(options, folder.options)
    vectors = describe(files, config.vector_column, folder.options)
    record = read_run_config(folder)
    if record is None:
        left = [folder.below(name) for name in (SEGMENTS, ROWS)]
        if stray := [name for name in (CARD, MANIFEST, TRAINED) if folder.exists(name)] + [
            f"{each.url}/{name}" for each in left for name in each.list()
        ]:
            raise UsageError(f"{folder.url} holds {stray[0]}, and no build of ours. Choose an empty --output")
        corpus = measure(files, options, folder.options, strict=True)
        check_ids(corpus, folder.options)
        choice = _chosen(config, corpus, vectors)
        about: dict[str, Any] = {
            "rows": int(corpus.rows),
            "id_column": corpus.id_column,
            "kind": to_spec(choice.kind),
        }
        about |= {"lists": choice.lists, "why": list(choice.why), "bytes": choice.bytes, "vectors": dict(vectors.made)}
        about |= {"dim": vectors.dim, "held": config.recall_queries}
        record = create_run_config(folder, {"settings": settings(config, folder.options)} | about)
    check_same_settings(folder, record["settings"], settings(config, folder.options))
    said = unlike(record["vectors"], vectors.made)
    if record["dim"] != vectors.dim or said:
        raise InputError(
            f"the vectors at {config.input} have {vectors.dim} dimensions, those of the index {record['dim']}"
            + (f"; {said}" if said else "")
            + ". They cannot be compared: build another index"
        )
    kind = parse(record["kind"])
    refuse_for_kind(config, kind)
    choice = IndexPlan(kind, record["lists"], tuple(record["why"]), record["bytes"])
    return IndexBuild(
        config, folder, vectors, choice, record["rows"], record["held"], record["id_column"], record["key"]
    )


def corpus_options(config: IndexConfig) -> VectorOptions:
    kept = dict.fromkeys([config.vector_column, *config.keep_columns])
    return VectorOptions(
        input=config.input,
        output=config.output,
        id_column=config.id_column,
        keep_columns=tuple(kept),
        limit=config.limit,
        shard_rows=config.shard_rows,
        storage_option=config.storage_option,
    )


def _chosen(config: IndexConfig, corpus: Corpus, vectors: Vectors) -> IndexPlan:
    if not corpus.rows:
        raise InputError(f"{config.input} has no rows")
    choice = choose(config.kind, config.lists, corpus.rows, vectors.dim, config.memory, config.recall, config.merge)
    refuse_for_kind(config, choice.kind)
    return choice


def refuse_for_kind(config: IndexConfig, kind: IndexKind) -> None:
    """Raises UsageError for a merge or an export that this kind of index, or this machine, cannot make."""
    if config.merge and not kind.mergeable:
        raise UsageError(
            f"--merge {config.merge}: faiss cannot merge {to_spec(kind)} on disk. Its pieces are searched as they are: leave "
            "--merge out, or choose ivf-pq, ivf-rabitq, ivf-sq8 or ivf-flat"
        )
    if "centroids" in config.exports and not kind.has_lists:
        raise UsageError(
            f"--exports centroids: {to_spec(kind)} has no lists, hence no centroids. Leave it out, or choose a --kind that begins "
            "with ivf"
        )
    if "lance" not in config.exports:
        return
    if VECTOR in config.keep_columns:
        raise UsageError(
            f"--exports lance calls the vectors {VECTOR!r}: --keep-columns has another column of that name"
        )
    if find_spec("lance") is None:
        raise UsageError("--exports lance needs pylance. On every node: pip install -e '.[lance]'")


def check(config: IndexConfig) -> None:
    """Options that cannot go together, or values that cannot be. Raises UsageError."""
    if not config.input and not config.suppose:
        raise UsageError("no --input. Give the folder that embed_corpus.py wrote, or any Parquet with a vector column")
    if config.kind != AUTO:
        parse(config.kind)
    for name, share in (("recall", config.recall), ("min-recall", config.min_recall)):
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"--{name} {share:g} is a share: over 0, and 1 at most")
    if unknown := set(config.exports) - set(EXPORTS):
        raise UsageError(f"--exports {unknown.pop()}: choose from {', '.join(EXPORTS)}")
    if taken := RESERVED & set(config.keep_columns):
        raise UsageError(f"--keep-columns {taken.pop()}: the rows have a column of that name of their own. Rename it")
    if config.suppose and not config.dry_run:
        raise UsageError("--suppose is for --dry-run: it names a corpus that is not there")
    if config.suppose:
        return
    if not config.output:
        raise UsageError("no --output. Give a folder for the index, as --output index/ or s3://bucket/index/")
    refuse_nested(config.input, corpus_options(config))


def settings(config: IndexConfig, storage: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes the index. What is measured, merged or exported besides may change."""
    fs, path = filesystem(config.input, storage)
    named = ("kind", "lists", "metric", "vector_column", "id_column", "limit", "sample_rows", "shard_rows")
    found = {name: getattr(config, name) for name in named} | {"keep_columns": list(config.keep_columns)}
    auto = {"memory": config.memory, "recall": config.recall} if config.kind == AUTO else {}
    return {"verb": "index", "input": fs.unstrip_protocol(path)} | found | auto

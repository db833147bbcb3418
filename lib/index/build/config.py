"""Options of an index build, and the opened build: its folder, its input's format, the chosen kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from ...cli.options import group, option
from ...data.corpus import Corpus, list_files, measure
from ...engine.job import Job, refuse_nested, require_complete, run_job, stage_folder
from ...engine.mapper import FusedMapper
from ...engine.parts import Part
from ...engine.planner import FixedPlanner, Planner
from ...engine.run import Run, check_same_settings, create_run_config, read_run_config
from ...engine.workers import CpuWorkerOptions, WorkerOptions, WorkerPlan, WorkerRequest
from ...errors import InputError, UsageError
from ...storage.filesystem import StorageOptions, absolute, filesystem
from ...storage.folder import Folder
from ..kinds import ID_BYTES, IndexKind, Metric, names, parse, to_spec
from .choose_kind import AUTO, IndexPlan, choose
from .layout import CARD, CODE, LIST, MANIFEST, ROWS, SEGMENTS, TRAINED, VECTOR
from .vector_source import VectorFormat, VectorOptions, VectorSource, check_ids, describe, encoder_difference

RESERVED = {"id", LIST, CODE, "error"}
EXPORTS = ("centroids", "milvus", "pinecone", "lance")
NO_COLUMNS = pa.schema([])

MakeMapper = Callable[[Run, WorkerPlan], FusedMapper]


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Options of `jobs/build_index.py`."""

    vectors: VectorOptions = group(VectorOptions)
    output: str = option("Folder for the index; any fsspec URL. The same command resumes there.", "")
    kind: str = option(f"auto, or one of {', '.join(names())}; as ivf-rabitq:bits=2.", AUTO)
    lists: int | None = option("Inverted lists. Default: near 4 times the square root of the rows.", None, min=1)
    memory: str | None = option("Memory that the index may take while it serves, as 64GB; auto keeps to it.", None)
    recall: float = option("recall@10 that is wanted: for auto, and for the advice.", 0.9)
    metric: Metric = option("cosine: every vector's length is made 1. ip: inner product. l2: distance.", "cosine")
    sample_rows: int | None = option("Vectors to train on. Default: 50 a list.", None, min=1)
    queries: str | None = option(
        "Vectors of queries to measure recall with. Default: vectors held out of the sample.", None
    )
    recall_queries: int = option("Queries that recall is measured with.", 1000, min=1)
    min_recall: float | None = option(
        "End with an error where recall@10 is lower at every nprobe or efSearch; the index stays.", None
    )
    merge: int | None = option("Also merge the segments on disk into N indexes of about equal size.", None, min=1)
    exports: tuple[str, ...] = option(f"Also write, by commas: {', '.join(EXPORTS)}.", ())
    storage: StorageOptions = group(StorageOptions)
    workers: CpuWorkerOptions = group(CpuWorkerOptions)
    dry_run: bool = option("Print kind, sizes, memory and time by stage, and stop.", False)
    suppose: str | None = option("With --dry-run: a corpus of ROWSxDIM, as 1000000000x1024, instead of --input.", None)
    price_per_hour: float | None = option("Dollars a worker-hour, for --dry-run.", None)

    @property
    def folder(self) -> Folder:
        """The folder of the index."""
        return Folder(absolute(self.output), self.storage.fsspec)


@dataclass(frozen=True)
class IndexBuild:
    """An opened build.

    format: of the input's vectors. choice: kind and lists, chosen by the first command. rows: vectors in the input of the first
    command. held_out: vectors that the sample leaves out of training, as queries. key: fixed by the settings.
    """

    config: IndexConfig
    folder: Folder
    format: VectorFormat
    choice: IndexPlan
    rows: int
    held_out: int
    id_column: str | None
    key: str

    @property
    def storage(self) -> dict[str, Any]:
        return self.folder.options

    @property
    def kind(self) -> IndexKind:
        return self.choice.kind

    @property
    def row_bytes(self) -> float:
        """Bytes of a vector in a segment: its code and its number."""
        return self.kind.bytes(self.format.dim) + ID_BYTES

    @property
    def workers(self) -> WorkerOptions:
        """The workers of a stage: on CPUs, also where nodes have GPUs."""
        return WorkerOptions(**vars(self.config.workers), gpus_per_worker=0.0)

    def measure_input(self) -> Corpus:
        options = self.config.vectors
        return measure(list_files(options, self.storage), options, self.storage, strict=True)

    def source(self, columns: pa.Schema, keep_columns: tuple[str, ...] = ()) -> VectorSource:
        """A reader of the input's vectors. columns: all columns of the input."""
        return VectorSource(
            column=self.config.vectors.vector_column,
            id_column=self.id_column,
            keep_columns=keep_columns,
            format=self.format,
            normalize=self.config.metric == "cosine",
            columns=columns,
            storage=self.storage,
        )

    def stage(self, name: str, *fixed: Any) -> Folder:
        """The folder of a stage. fixed: everything that decides its rows, beside the settings of the build."""
        return stage_folder(self.folder, name, *fixed)

    def run_stage(
        self,
        folder: Folder,
        label: str,
        mapper: MakeMapper,
        plan: pa.Table,
        settings: Mapping[str, Any],
        *,
        columns: pa.Schema = NO_COLUMNS,
        weight_bytes: float = 0,
        workers: WorkerOptions | None = None,
    ) -> list[Part]:
        """Run or resume a stage; its parts, which are all there. Raises RunError when a shard failed for good.

        plan: its shards. settings: with `job`, its name. columns: of the shards' files, where the mapper reads rows of them.
        weight_bytes: that each worker loads.
        """
        planner = FixedPlanner(lambda: (plan, columns), WorkerRequest(workers or self.workers, int(weight_bytes)))
        return self.run_planned(folder, label, mapper, planner, settings)

    def run_planned(
        self, folder: Folder, label: str, mapper: MakeMapper, planner: Planner, settings: Mapping[str, Any]
    ) -> list[Part]:
        """The same, with shards of any planner."""
        job = Job(label, {**settings, "build": self.key}, mapper)
        return require_complete(run_job(job, folder, planner), folder.url).parts


def open_index_build(config: IndexConfig) -> IndexBuild:
    """Read the footers of the input; start the build, or resume the one in the folder. Raises ShoalError, within seconds."""
    check(config)
    folder, options = config.folder, config.vectors
    folder.probe()
    files = list_files(options, folder.options)
    format = describe(files, options.vector_column, folder.options)
    run_config = read_run_config(folder)
    if run_config is None:
        _refuse_stray_files(folder)
        corpus = measure(files, options, folder.options, strict=True)
        run_config = create_run_config(folder, _new_run_config(config, corpus, format))
    check_same_settings(folder, run_config["settings"], settings(config))
    _refuse_other_encoder(config, run_config, format)
    kind = parse(run_config["kind"])
    refuse_for_kind(config, kind)
    choice = IndexPlan(kind, run_config["lists"], tuple(run_config["why"]), run_config["bytes"])
    facts = {name: run_config[name] for name in ("rows", "held_out", "id_column", "key")}
    return IndexBuild(config, folder, format, choice, **facts)


def _new_run_config(config: IndexConfig, corpus: Corpus, format: VectorFormat) -> dict[str, Any]:
    check_ids(corpus, config.storage.fsspec)
    choice = choose_for(config, corpus, format)
    return {
        "settings": settings(config),
        "rows": int(corpus.rows),
        "id_column": corpus.id_column,
        "kind": to_spec(choice.kind),
        "lists": choice.lists,
        "why": list(choice.why),
        "bytes": choice.bytes,
        "encoder": dict(format.encoder),
        "dim": format.dim,
        "held_out": config.recall_queries,
    }


def _refuse_stray_files(folder: Folder) -> None:
    """Raise UsageError for files of an index in a folder without a build."""
    stray = [name for name in (CARD, MANIFEST, TRAINED) if folder.exists(name)]
    for below in (folder.below(SEGMENTS), folder.below(ROWS)):
        stray += [f"{below.url}/{name}" for name in below.list()]
    if stray:
        raise UsageError(f"{folder.url} holds {stray[0]}, and no build of ours. Choose an empty --output")


def _refuse_other_encoder(config: IndexConfig, run_config: Mapping[str, Any], format: VectorFormat) -> None:
    """Raise InputError for vectors that cannot be compared with those of the index."""
    difference = encoder_difference(run_config["encoder"], format.encoder)
    if run_config["dim"] != format.dim or difference:
        raise InputError(
            f"the vectors at {config.vectors.input} have {format.dim} dimensions, those of the index {run_config['dim']}"
            + (f"; {difference}" if difference else "")
            + ". They cannot be compared: build another index"
        )


def choose_for(config: IndexConfig, corpus: Corpus, format: VectorFormat) -> IndexPlan:
    """Choose kind and lists for a corpus. Raises InputError for one without rows, UsageError for options that cannot be."""
    if not corpus.rows:
        raise InputError(f"{config.vectors.input} has no rows")
    choice = choose(config.kind, config.lists, corpus.rows, format.dim, config.memory, config.recall, config.merge)
    refuse_for_kind(config, choice.kind)
    return choice


def refuse_for_kind(config: IndexConfig, kind: IndexKind) -> None:
    """Raise UsageError for a merge or an export that this kind of index, or this machine, cannot make."""
    if config.merge and not kind.mergeable:
        raise UsageError(
            f"--merge {config.merge}: faiss cannot merge {to_spec(kind)} on disk. Its segments are searched as they are: leave "
            "--merge out, or choose ivf-pq, ivf-rabitq, ivf-sq8 or ivf-flat"
        )
    if "centroids" in config.exports and not kind.has_lists:
        raise UsageError(
            f"--exports centroids: {to_spec(kind)} has no lists, hence no centroids. Leave it out, or choose a --kind that begins "
            "with ivf"
        )
    if "lance" not in config.exports:
        return
    if VECTOR in config.vectors.keep_columns:
        raise UsageError(f"--exports lance calls the vectors {VECTOR!r}: --keep-columns has a column of that name")
    if find_spec("lance") is None:
        raise UsageError("--exports lance needs pylance. On every node: pip install -e '.[lance]'")


def check(config: IndexConfig) -> None:
    """Raise UsageError for options that cannot go together, or values that cannot be."""
    options = config.vectors
    if not options.input and not config.suppose:
        raise UsageError("no --input. Give the folder that embed_corpus.py wrote, or any Parquet with a vector column")
    if config.kind != AUTO:
        parse(config.kind)
    for name, share in (("recall", config.recall), ("min-recall", config.min_recall)):
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"--{name} {share:g} is a share: over 0, and 1 at most")
    if unknown := set(config.exports) - set(EXPORTS):
        raise UsageError(f"--exports {unknown.pop()}: choose from {', '.join(EXPORTS)}")
    if reserved := RESERVED & set(options.keep_columns):
        raise UsageError(f"--keep-columns {reserved.pop()}: the rows have a column of that name. Rename it")
    if config.suppose and not config.dry_run:
        raise UsageError("--suppose is for --dry-run: it names a corpus that is not there")
    if config.suppose:
        return
    if not config.output:
        raise UsageError("no --output. Give a folder for the index, as --output index/ or s3://bucket/index/")
    refuse_nested(options.input, config.output, config.storage.fsspec)


def settings(config: IndexConfig) -> dict[str, Any]:
    """The settings that fix the index. Measurements, merges and exports may change."""
    options = config.vectors
    fs, path = filesystem(options.input, config.storage.fsspec)
    auto = ("memory", "recall") if config.kind == AUTO else ()
    own = {name: getattr(config, name) for name in ("kind", "lists", "metric", "sample_rows", *auto)}
    names = "vector_column", "id_column", "keep_columns", "limit", "shard_rows"
    vectors = {name: getattr(options, name) for name in names}
    return {"job": "index", "input": fs.unstrip_protocol(path)} | own | vectors

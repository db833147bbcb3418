"""What an evaluation is told, and what is read before anything is computed: models, tasks, their data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..engine.workers import WorkerOptions
from ..errors import ModelError, UsageError
from ..models.encoder_options import EncoderOptions, ModelOptions, ResolvedEncoder, prompt_of, resolve_encoder
from ..models.files import read_json
from ..models.reranker_options import RerankerOptions, resolve_reranker
from ..models.reranker_spec import RerankSpec
from ..recipes import PASSAGE_NAMES, QUERY, RerankRecipe, names
from ..storage.filesystem import absolute, parse_options
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from ..storage.listing import WILDCARDS, find
from . import dataset_layouts, tasks
from .dataset import Dataset, read_dataset
from .dataset_checks import checked
from .dataset_layouts import Tables
from .metrics import CUTS
from .tasks import Task

SIMILARITIES = {None: True, "cosine": True, "dot": False}  # sentence-transformers' names: whether lengths do not count


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EncoderOptions, WorkerOptions):
    """Everything `jobs/evaluate_model.py` can be told."""

    output: str = field(
        metadata={
            "help": "Folder for results, vectors and runs of any number of models; any fsspec URL. Resumes there."
        }
    )
    task: tuple[str, ...] = field(
        default=(), metadata={"help": f"Tasks by commas, or a name for data of your own: {', '.join(tasks.names())}."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Folder of a dataset (BEIR, or a copy from a hub), or of folders named after the tasks."},
    )
    corpus: str | None = field(default=None, metadata={"help": "Passages: _id or id, text, perhaps title; any format."})
    queries: str | None = field(default=None, metadata={"help": "Queries: _id or id, text."})
    qrels: str | None = field(default=None, metadata={"help": "Judgments: query-id, corpus-id, score."})
    candidates: str | None = field(
        default=None, metadata={"help": "query-id and corpus-id of the only pairs to rank, as for a reranking task."}
    )
    split: str | None = field(default=None, metadata={"help": "Split of the dataset. Default: the task's, else test."})
    query_prompt: str | None = field(
        default=None, metadata={"help": "Before every query. Default: the recipe's or model's."}
    )
    passage_prompt: str | None = field(default=None, metadata={"help": "Before every passage. Default: the same."})
    reranker: str | None = field(
        default=None, metadata={"help": "Reranker directory or hub id: ranks what was retrieved, or the candidates."}
    )
    reranker_recipe: str | None = field(
        default=None, metadata={"help": f"Published reranker: {', '.join(names(RerankRecipe))}."}
    )
    instruction: str | None = field(default=None, metadata={"help": "The task in words, for rerankers that take one."})
    rerank_top: int = field(default=100, metadata={"help": "Passages a query that the reranker gets.", "min": 1})
    ignore_identical_ids: bool = field(
        default=False,
        metadata={"help": "A passage with its query's own id does not count. Default: as the task has it."},
    )
    name: str | None = field(
        default=None, metadata={"help": "What results are filed under. Default: the models' names."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Tokens a batch. Default: 1024 on CPUs, by model size on GPUs.", "min": 1}
    )
    storage_option: tuple[str, ...] = field(
        default=(),
        metadata={"help": "fsspec option, as endpoint_url=http://host:9000. Repeat it for more.", "many": True},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print plan, tokens, memory and cost of each task, and stop."}
    )
    price_per_hour: float | None = field(default=None, metadata={"help": "Dollars a worker-hour, for --dry-run."})


@dataclass(frozen=True)
class EvaluatedModels:
    """The models read. encoder: None where only a reranker is evaluated; cosine: how its vectors are compared."""

    name: str
    encoder: ResolvedEncoder | None
    cosine: bool
    reranker: RerankSpec | None

    @property
    def revision(self) -> str:
        specs = [self.encoder.spec if self.encoder else None, self.reranker.model if self.reranker else None]
        return "+".join(spec.revision for spec in specs if spec)


@dataclass(frozen=True)
class TaskData:
    """A task with its data read. folder: of what is made from this data, named after its files. vectors: of what is made from
    the corpus alone, whatever is asked of it. data: what is judged, by whom and in which candidates, in 12 hex digits."""

    task: Task
    dataset: Dataset
    folder: Folder
    vectors: Folder
    data: str


def read_system(config: EvaluateConfig) -> EvaluatedModels:
    """Read the models' files. Raises UsageError or ModelError for what cannot be evaluated."""
    has_encoder, has_reranker = (
        bool(a or b) for a, b in ((config.model, config.recipe), (config.reranker, config.reranker_recipe))
    )
    if not has_encoder and not has_reranker:
        raise UsageError("no --model or --recipe, and no --reranker or --reranker-recipe. Give one to evaluate")
    if not has_encoder and (config.query_prompt or config.passage_prompt):
        raise UsageError(
            "--query-prompt and --passage-prompt are an encoder's, and there is no --model. Leave them out"
        )
    if not has_encoder and (config.max_tokens or config.truncate_dim or config.pooling):
        raise UsageError(
            "--max-tokens, --truncate-dim and --pooling are an encoder's, and there is no --model. Leave them out"
        )
    if config.rerank_top > max(CUTS):
        raise UsageError(
            f"--rerank-top {config.rerank_top}: {max(CUTS):,} passages a query are retrieved. Ask for no more"
        )
    if not has_reranker and config.instruction:
        raise UsageError(
            "--instruction is a reranker's, and there is no --reranker. For an encoder write --query-prompt"
        )
    encoder = resolve_encoder(encoder_options(config)) if has_encoder else None
    reranker = resolve_reranker(reranker_options(config)) if has_reranker else None
    if reranker:
        reranker.pair_format()  # what is wrong with its tokenizer is told now
    models = [spec for spec in (encoder and encoder.spec, reranker and reranker.model) if spec]
    return EvaluatedModels(
        name=safe_name(config.name or "+".join(_short(spec.name) for spec in models)),
        encoder=encoder,
        cosine=_compared_by_cosine(encoder) if encoder else True,
        reranker=reranker,
    )


def read_works(config: EvaluateConfig, system: EvaluatedModels, storage: Mapping[str, Any]) -> list[TaskData]:
    """Every task with its data, before the first of them is computed. Raises UsageError, InputError, StorageError."""
    explicit = (config.corpus, config.queries, config.qrels)
    if any(explicit) and not all(explicit):
        raise UsageError("--corpus, --queries and --qrels go together. Or give --dataset with a folder of all three")
    if any(explicit) and config.dataset:
        raise UsageError("--dataset and --corpus exclude each other: both say where the data is")
    if config.candidates and not any(explicit):
        raise UsageError("--candidates goes with --corpus, --queries and --qrels")
    if any(explicit) and len(config.task) > 1:
        raise UsageError(f"--corpus is the data of one task, and --task names {len(config.task)}. Use --dataset")
    return [_work(task, config, system, storage) for task in _tasks(config)]


def encoder_options(config: EvaluateConfig, **more: Any) -> ModelOptions:
    shared = {name: getattr(config, name) for name in EncoderOptions.__dataclass_fields__}
    return ModelOptions(**shared | more)


def reranker_options(config: EvaluateConfig) -> RerankerOptions:
    return RerankerOptions(
        model=config.reranker, recipe=config.reranker_recipe, instruction=config.instruction, dtype=config.dtype
    )


def prompts_of(config: EvaluateConfig, encoding: ResolvedEncoder, task: Task) -> dict[str, str]:
    """The prompts of a task's passages and queries."""
    return {
        "passages": prompt_of(encoding, config.passage_prompt, PASSAGE_NAMES),
        "queries": prompt_of(encoding, config.query_prompt, (task.name, QUERY)),
    }


def safe_name(name: str) -> str:
    """As mteb names folders: no slash, no space; and not hidden. Raises UsageError where nothing is left of it."""
    if not (safe := name.replace("/", "__").replace(" ", "_").lstrip("._")):
        raise UsageError(f"{name!r} is no name for a folder. Give a --name, or --task, with letters")
    return safe


def _short(name: str) -> str:
    """A hub id whole, of a path its end."""
    looks_local = name.startswith((".", "/", "~")) or "://" in name or name.count("/") > 1
    return PurePosixPath(name.rstrip("/")).name if looks_local else name


def _compared_by_cosine(encoding: ResolvedEncoder) -> bool:
    head = read_json(Path(encoding.spec.path) / "config_sentence_transformers.json", {})
    name = head.get("similarity_fn_name")
    if name not in SIMILARITIES:
        raise ModelError(f"{encoding.spec.name} compares vectors by {name!r}. Here: cosine or dot product")
    return SIMILARITIES[name]


def _tasks(config: EvaluateConfig) -> list[Task]:
    own = PurePosixPath(absolute(config.dataset)).name if config.dataset else "custom" if config.corpus else None
    named = config.task or ([own] if own else [])
    if not named:
        raise UsageError(f"no --task. Known: {', '.join(tasks.names())}. Or give --dataset with a folder of your own")
    chosen = []
    for name in named:
        task = tasks.find(name)
        if task is None and config.dataset is None and config.corpus is None:
            raise UsageError(
                f"no task {name!r}. Known: {', '.join(tasks.names())}. For data of your own give --dataset, or --corpus, "
                "--queries and --qrels"
            )
        task = task or Task(name=safe_name(name))
        split = config.split or task.split
        same = config.ignore_identical_ids or task.ignore_identical_ids
        chosen.append(replace(task, split=split, ignore_identical_ids=same))
    return chosen


def _work(task: Task, config: EvaluateConfig, system: EvaluatedModels, storage: Mapping[str, Any]) -> TaskData:
    if config.corpus:
        tables = Tables(str(config.qrels), config.corpus, config.queries, config.candidates)
    else:
        named = bool(config.task) or config.dataset is None  # else the task is named after the folder
        place = (
            dataset_layouts.locate(task, config.dataset, len(config.task) < 2, storage)
            if named
            else str(config.dataset)
        )
        tables = dataset_layouts.tables_of(place, task.split, storage)
    if config.corpus or config.dataset:
        task = replace(task, revision="")  # what a copy of one's own is of cannot be told
    urls = (tables.corpus, tables.queries, tables.judgments, tables.candidates)
    work = _folder(config, f"{task.name}-{task.split}", urls)
    template = system.encoder.text_template if system.encoder else None
    dataset = checked(read_dataset(tables, task.split, template, work), work)
    if dataset.candidates is not None and not tasks.find(task.name):
        task = replace(task, kind="reranking")
    refuse_unfit(task, dataset, system)
    return TaskData(task, dataset, work, _folder(config, "corpus", [dataset.passages.url]), _digest(dataset, storage))


def refuse_unfit(task: Task, dataset: Dataset, system: EvaluatedModels) -> None:
    """Raises UsageError where the models and the data do not fit each other."""
    if dataset.candidates is None and task.kind == "reranking":
        raise UsageError(f"{task.name} is a reranking task, and its data has no candidates (top_ranked). Get it whole")
    if dataset.candidates is None and system.encoder is None:
        raise UsageError(
            f"{task.name} has no candidates for a reranker alone. Give --model too, which retrieves them, or --candidates"
        )
    if dataset.candidates is not None and system.encoder and system.reranker:
        raise UsageError(
            f"{task.name} gives the candidates, so that an encoder before the reranker has no part. Leave out --model or "
            "--reranker, and evaluate the other in a run of its own"
        )


def _folder(config: EvaluateConfig, name: str, urls: Sequence[str | None]) -> Folder:
    """A folder below the output whose name changes when any file at the URLs does."""
    storage = parse_options(config.storage_option)
    seen = [(absolute(url), find(absolute(url), storage)) for url in urls if url]
    key = fingerprint(seen)
    place = f"{absolute(config.output).rstrip('/')}/stages/{name}-{key}"
    if any(letter in place for letter in WILDCARDS):
        raise UsageError(
            f"{place} would be read as a pattern. Choose an --output, --task and --split without any of {WILDCARDS}"
        )
    return Folder(place, storage)


def _digest(dataset: Dataset, storage: Mapping[str, Any]) -> str:
    """Of judgments, queries and candidates themselves, and of names and sizes of the corpus's files, wherever they lie."""
    tables = [dataset.queries, dataset.candidates]
    said: list[Any] = [(file.name, file.size) for file in find(absolute(dataset.passages.url), storage)]
    said += sorted((query, sorted(grades.items())) for query, grades in dataset.qrels.items())
    rows = [sorted(map(repr, table.to_pylist())) for table in tables if table is not None]
    return fingerprint(said + rows)

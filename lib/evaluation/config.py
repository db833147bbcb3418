"""Options of the evaluate job, and what cannot go together."""

from dataclasses import dataclass

from ..cli.options import group, option
from ..engine.workers import WorkerOptions
from ..errors import UsageError
from ..models.encoder_options import EncoderOptions
from ..models.reranker_options import SecondStageOptions
from ..storage.filesystem import StorageOptions, absolute
from ..storage.folder import Folder
from ..storage.listing import WILDCARDS
from . import tasks
from .metrics import CUTS


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The tasks, and where their data is."""

    task: tuple[str, ...] = option(f"Tasks by commas, or a name for data of your own: {', '.join(tasks.names())}.", ())
    dataset: str | None = option(
        "Folder of a dataset (BEIR, or a copy from a hub), or of folders named after the tasks.", None
    )
    corpus: str | None = option("Passages: _id or id, text, perhaps title; any format.", None)
    queries: str | None = option("Queries: _id or id, text.", None)
    qrels: str | None = option("Judgments: query-id, corpus-id, score.", None)
    candidates: str | None = option("query-id and corpus-id of the only pairs to rank, as for a reranking task.", None)
    split: str | None = option("Split of the dataset. Default: the task's, else test.", None)
    ignore_identical_ids: bool = option(
        "A passage with its query's own id does not count. Default: as the task has it.", False
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of `jobs/evaluate_model.py`."""

    output: str = option("Folder for results, vectors and runs of any number of models; any fsspec URL. Resumes there.")
    tasks: TaskOptions = group(TaskOptions)
    model: EncoderOptions = group(EncoderOptions)
    query_prompt: str | None = option("Before every query. Default: the recipe's or model's.", None)
    passage_prompt: str | None = option("Before every passage. Default: the same.", None)
    second_stage: SecondStageOptions = group(SecondStageOptions)
    instruction: str | None = option("The task in words, for rerankers that take one.", None)
    rerank_top: int = option("Passages a query that the reranker gets.", 100, min=1)
    name: str | None = option("What results are filed under. Default: the models' names.", None)
    storage: StorageOptions = group(StorageOptions)
    workers: WorkerOptions = group(WorkerOptions)
    dry_run: bool = option("Print plan, tokens, memory and cost of each task, and stop.", False)
    price_per_hour: float | None = option("Dollars a worker-hour, for --dry-run.", None)

    @property
    def folder(self) -> Folder:
        """The output folder."""
        return Folder(absolute(self.output), self.storage.fsspec)

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder is evaluated, alone or before the reranker."""
        return bool(self.model.model or self.model.recipe)


def check(config: EvaluateConfig) -> None:
    """Raises UsageError for options that cannot go together."""
    _check_models(config)
    _check_tasks(config.tasks)
    for name in (absolute(config.output), *config.tasks.task, config.tasks.split or ""):
        if any(letter in name for letter in WILDCARDS):
            raise UsageError(
                f"{name} would be read as a pattern. Choose an --output, --task and --split without any of {WILDCARDS}"
            )


def safe_name(name: str) -> str:
    """The name for a folder, as mteb writes it: no slash, no space, not hidden. Raises UsageError where nothing is left."""
    if not (safe := name.replace("/", "__").replace(" ", "_").lstrip("._")):
        raise UsageError(f"{name!r} is no name for a folder. Give a --name, or --task, with letters")
    return safe


def _check_models(config: EvaluateConfig) -> None:
    if not config.has_encoder:
        _check_reranker_alone(config)
    if config.rerank_top > max(CUTS):
        raise UsageError(
            f"--rerank-top {config.rerank_top}: {max(CUTS):,} passages a query are retrieved. Ask for no more"
        )
    if config.instruction and not config.second_stage.enabled:
        raise UsageError(
            "--instruction is a reranker's, and there is no --reranker. For an encoder write --query-prompt"
        )


def _check_reranker_alone(config: EvaluateConfig) -> None:
    if not config.second_stage.enabled:
        raise UsageError("no --model or --recipe, and no --reranker or --reranker-recipe. Give one to evaluate")
    if config.query_prompt or config.passage_prompt:
        raise UsageError(
            "--query-prompt and --passage-prompt are an encoder's, and there is no --model. Leave them out"
        )
    if config.model.max_tokens or config.model.truncate_dim or config.model.pooling:
        raise UsageError(
            "--max-tokens, --truncate-dim and --pooling are an encoder's, and there is no --model. Leave them out"
        )


def _check_tasks(options: TaskOptions) -> None:
    explicit = (options.corpus, options.queries, options.qrels)
    if any(explicit) and not all(explicit):
        raise UsageError("--corpus, --queries and --qrels go together. Or give --dataset with a folder of all three")
    if any(explicit) and options.dataset:
        raise UsageError("--dataset and --corpus exclude each other: both say where the data is")
    if options.candidates and not any(explicit):
        raise UsageError("--candidates goes with --corpus, --queries and --qrels")
    if any(explicit) and len(options.task) > 1:
        raise UsageError(f"--corpus is the data of one task, and --task names {len(options.task)}. Use --dataset")

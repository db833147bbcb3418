"""The tasks of an evaluation with their data, read and checked before the first of them is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from ..engine.job import stage_folder
from ..errors import UsageError
from ..storage.filesystem import absolute
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from ..storage.listing import find
from . import dataset_layouts, tasks
from .config import EvaluateConfig, TaskOptions, safe_name
from .dataset import Dataset, read_dataset
from .dataset_checks import with_notes
from .dataset_layouts import TableUrls
from .models import EvaluatedModels
from .tasks import Task


@dataclass(frozen=True)
class TaskData:
    """A task with its data.

    folder: of stages that depend on this data, named after its files. vectors: of stages that depend on the corpus alone, so that
    tasks with other queries share them. digest: 12 hex digits of queries, judgments and candidates, and of the corpus's files.
    """

    task: Task
    dataset: Dataset
    folder: Folder
    vectors: Folder
    digest: str


def read_tasks(config: EvaluateConfig, models: EvaluatedModels) -> list[TaskData]:
    """Every task with its data. Raises UsageError, InputError or StorageError for data that cannot be scored."""
    return [_read_task(task, config, models) for task in _tasks(config.tasks)]


def check_fit(task: Task, dataset: Dataset, models: EvaluatedModels) -> None:
    """Raises UsageError where the models and the data do not fit each other."""
    if dataset.candidates is None and task.kind == "reranking":
        raise UsageError(f"{task.name} is a reranking task, and its data has no candidates (top_ranked). Get it whole")
    if dataset.candidates is None and models.encoder is None:
        raise UsageError(
            f"{task.name} has no candidates for a reranker alone. Give --model too, which retrieves them, or --candidates"
        )
    if dataset.candidates is not None and models.encoder and models.reranker:
        raise UsageError(
            f"{task.name} gives the candidates, so that an encoder before the reranker has no part. Leave out --model or "
            "--reranker, and evaluate the other in a run of its own"
        )


def _tasks(options: TaskOptions) -> list[Task]:
    own = PurePosixPath(absolute(options.dataset)).name if options.dataset else "custom" if options.corpus else None
    requested = options.task or ([own] if own else [])
    if not requested:
        raise UsageError(f"no --task. Known: {', '.join(tasks.names())}. Or give --dataset with a folder of your own")
    return [_task(name, options) for name in requested]


def _task(name: str, options: TaskOptions) -> Task:
    """The task of that name, or a new one for data of one's own."""
    task = tasks.find(name)
    if task is None and options.dataset is None and options.corpus is None:
        raise UsageError(
            f"no task {name!r}. Known: {', '.join(tasks.names())}. For data of your own give --dataset, or --corpus, "
            "--queries and --qrels"
        )
    task = task or Task(name=safe_name(name))
    same = options.ignore_identical_ids or task.ignore_identical_ids
    return replace(task, split=options.split or task.split, ignore_identical_ids=same)


def _read_task(task: Task, config: EvaluateConfig, models: EvaluatedModels) -> TaskData:
    options, storage = config.tasks, config.storage.fsspec
    tables = _table_urls(task, options, storage)
    if options.corpus or options.dataset:
        task = replace(task, revision="")  # the revision of an own copy is unknown
    urls = (tables.corpus, tables.queries, tables.judgments, tables.candidates)
    folder = _folder(config, f"{task.name}-{task.split}", urls)
    template = models.encoder.text_template if models.encoder else None
    dataset = with_notes(read_dataset(tables, task.split, template, folder), folder)
    if dataset.candidates is not None and not tasks.find(task.name):
        task = replace(task, kind="reranking")
    check_fit(task, dataset, models)
    vectors = _folder(config, "corpus", [dataset.passages.url])
    return TaskData(task, dataset, folder, vectors, _digest(dataset, storage))


def _table_urls(task: Task, options: TaskOptions, storage: Mapping[str, Any]) -> TableUrls:
    if options.corpus:
        return TableUrls(str(options.qrels), options.corpus, options.queries, options.candidates)
    if options.task or options.dataset is None:
        place = dataset_layouts.locate(task, options.dataset, len(options.task) < 2, storage)
    else:
        place = options.dataset  # the task is named after the folder
    return dataset_layouts.tables_of(place, task.split, storage)


def _folder(config: EvaluateConfig, name: str, urls: Sequence[str | None]) -> Folder:
    """A folder below the output whose name changes when any file at the URLs does."""
    storage = config.storage.fsspec
    files = [(absolute(url), find(absolute(url), storage)) for url in urls if url]
    return stage_folder(config.folder, name, files)


def _digest(dataset: Dataset, storage: Mapping[str, Any]) -> str:
    """The digest of judgments, queries and candidates, and of names and sizes of the corpus's files, wherever they are."""
    tables = [dataset.queries, dataset.candidates]
    content: list[Any] = [(file.name, file.size) for file in find(absolute(dataset.passages.url), storage)]
    content += sorted((query, sorted(grades.items())) for query, grades in dataset.qrels.items())
    rows = [sorted(map(repr, table.to_pylist())) for table in tables if table is not None]
    return fingerprint(content + rows)

"""Layouts of retrieval datasets: a BEIR folder, a Hugging Face dataset of mteb's or C-MTEB's, a hub's copy.

    BEIR                corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv
    mteb                folders corpus, queries, qrels or default, top_ranked with SPLIT-*.parquet or .jsonl, or the files
                        that the README's `configs` name
    C-MTEB, first form  data/corpus-*.parquet, data/queries-*.parquet, and data/SPLIT-*.parquet in the folder FOLDER-qrels;
                        reranking: data/SPLIT-*.parquet with columns query, positive, negative

Files may be of any format that a corpus may have.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from ..data.formats import COMPRESSIONS, format_of
from ..errors import InputError, UsageError
from ..storage.filesystem import filesystem
from ..storage.listing import WILDCARDS, find
from ..storage.retry import retrying
from .tasks import Task

# A place is a folder and the beginning of its files' names, up to the ending or the number of a part; with `/` at the end it is the
# whole folder. The first place with any file counts. Judgments are qrels, or lists of positives and negatives.
PLACES = {
    "corpus": ("corpus", "corpus/{split}", "corpus/corpus", "corpus/", "data/corpus"),
    "queries": ("queries", "queries/{split}", "queries/queries", "queries/", "data/queries"),
    "judgments": ("qrels/{split}", "default/{split}", "data/{split}", "{split}"),
    "candidates": ("top_ranked/{split}",),
}
PART = r"-\d{5}-of-\d{5}"  # of a split in several files, as the hub numbers them
CONFIGS = {"judgments": ("qrels", "default"), "candidates": ("top_ranked",)}  # others are named as the table
NO_SPLITS = ("corpus", "queries")


@dataclass(frozen=True)
class TableUrls:
    """URLs or globs of a dataset's tables.

    judgments: qrels, or lists of positives and negatives, which bring their own queries and passages.
    """

    judgments: str
    corpus: str | None = None
    queries: str | None = None
    candidates: str | None = None


def tables_of(folder: str, split: str, storage: Mapping[str, Any]) -> TableUrls:
    """The tables of the dataset in a folder. Raises InputError when there is none, UsageError for a split it lacks."""
    files = [file for file in find(folder, storage) if format_of(file.path)]
    names = [file.name for file in files]
    last = folder.rstrip("/").rpartition("/")[2]
    if not files or files[0].path.endswith(f"/{last}"):  # no file, or the URL of a file
        raise InputError(
            f"no dataset at {folder}. A dataset is corpus.jsonl, queries.jsonl and qrels/{split}.tsv (BEIR), or a copy of "
            "a Hugging Face dataset with Parquet or JSONL in corpus, queries and qrels"
        )
    urls = _from_readme(folder, split, names, storage)
    for kind in PLACES.keys() - urls.keys():
        if url := _at_places(folder, PLACES[kind], split, names):
            urls[kind] = url
    if "judgments" not in urls:
        beside = f"{folder.rstrip('/')}-qrels"
        others = [file.name for file in find(beside, storage) if format_of(file.path)]
        url = _at_places(beside, PLACES["judgments"], split, others)
        if url is None:
            raise _no_split(beside if others else folder, split, others or names)
        urls["judgments"] = url
    return TableUrls(**urls)


def locate(task: Task, dataset: str | None, alone: bool, storage: Mapping[str, Any]) -> str:
    """The folder of a task's dataset: below `dataset` under the task's name; for a task that is alone also `dataset` itself;
    without one, a copy from the hub.

    Raises InputError where there is none, with the command that fetches it.
    """
    if dataset is None:
        return _from_hub(task)
    if any(letter in dataset for letter in WILDCARDS):
        raise UsageError(
            f"--dataset {dataset} is a pattern. Give the folder itself; rename one whose name has any of {WILDCARDS}"
        )
    places = [f"{dataset.rstrip('/')}/{name}" for name in dict.fromkeys((task.name, task.dataset)) if name]
    if alone:
        places.append(dataset)
    folder = next((place for place in places if find(place, storage)), None)
    if folder is None:
        raise InputError(f"no data of {task.name} in {dataset}: looked for {', '.join(places)}. Put it there")
    return folder


def _from_hub(task: Task) -> str:
    if not task.dataset:
        raise UsageError(f"--task {task.name} needs its data: give --dataset, or --corpus, --queries and --qrels")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(task.dataset, repo_type="dataset", revision=task.revision)
    except Exception as error:
        raise InputError(
            f"{task.name}: no copy of {task.dataset} here, and the hub does not give one ({type(error).__name__}). Where "
            f"there is a hub: hf download {task.dataset} --repo-type dataset --revision {task.revision} --local-dir "
            f"DIR/{task.name}; then --dataset DIR"
        ) from error


def _at_places(folder: str, places: Iterable[str], split: str, names: Sequence[str]) -> str | None:
    """The URL of the file, or glob of the files, at the first place where there are any."""
    for place in places:
        stem = place.replace("{split}", split)
        if stem.endswith("/") and any(name.startswith(stem) for name in names):
            return f"{folder.rstrip('/')}/{stem.rstrip('/')}"
        files = [name for name in names if re.fullmatch(rf"{re.escape(stem)}({PART}[^/]*)?", _bare(name))]
        if len(files) > 1 and any(_bare(name) == stem for name in files):
            raise InputError(
                f"{folder} has {' and '.join(sorted(files))}, and only one can be meant. Move the others away"
            )
        if files:
            parts = f"{stem}-[0-9][0-9][0-9][0-9][0-9]-of-*"
            return f"{folder.rstrip('/')}/{files[0] if len(files) == 1 else parts}"
    return None


def _bare(name: str) -> str:
    """The name without the endings of compression and format."""
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return name.rpartition(".")[0]


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _no_split(folder: str, split: str, names: Sequence[str]) -> UsageError | InputError:
    places = ("qrels", "default", "data", ".")
    bare = [PurePosixPath(_bare(name)) for name in names]
    stems = {re.split(PART, path.name)[0] for path in bare if str(path.parent) in places}
    splits = sorted(stems - set(NO_SPLITS))
    if splits:
        return UsageError(f"no split {split!r} in {folder}. Splits there: {', '.join(splits)}. Choose one with --split")
    return InputError(f"no qrels in {folder}: qrels/{split}.tsv or another of the known places. Give --qrels URL")


def _from_readme(folder: str, split: str, names: Sequence[str], storage: Mapping[str, Any]) -> dict[str, str]:
    """The URLs of the tables that the `configs` in the README's head name."""
    fs, path = filesystem(folder, storage)
    try:
        text = retrying(lambda: fs.cat_file(f"{path}/README.md"), folder).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise InputError(f"{folder}/README.md: its head is not YAML ({error}). Mend it, or remove the file") from error
    listed = metadata.get("configs") if isinstance(metadata, dict) else None
    configs = {each.get("config_name"): each for each in listed or [] if isinstance(each, dict)}
    urls = {}
    for kind in PLACES:
        config = next((configs[name] for name in CONFIGS.get(kind, (kind,)) if name in configs), None)
        pattern = _data_files(config.get("data_files"), split, kind) if config else None
        if matching := [name for name in names if pattern and _matches(name, pattern)]:
            urls[kind] = f"{folder.rstrip('/')}/{matching[0] if len(matching) == 1 else pattern}"
    return urls


def _data_files(files: Any, split: str, kind: str) -> str | None:
    """The pattern of a config: of the split, or of the single split that corpora and queries may have instead."""
    if isinstance(files, str):
        return files
    listed = files if isinstance(files, list) else []
    by_split = {each.get("split"): each.get("path") for each in listed if isinstance(each, dict)}
    only = next(iter(by_split.values())) if kind in NO_SPLITS and len(by_split) == 1 else None
    path = by_split.get(split) or by_split.get(kind) or only
    return path[0] if isinstance(path, list) and len(path) == 1 else path if isinstance(path, str) else None

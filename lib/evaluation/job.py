"""Evaluate a model, a reranker or both on retrieval and reranking tasks, and file the results."""

import logging
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.stage_log import StageLog
from ..index.exact.mappers import PASSAGE_ID, QUERY_ID, SCORE
from ..storage.filesystem import absolute, parse_options
from ..storage.folder import Folder
from .config import EvaluateConfig, EvaluatedModels, TaskData, prompts_of, read_system, read_works
from .dataset import Dataset
from .metrics import NAMES
from .metrics import evaluate as evaluate_block
from .results import Result, averaged, check_same_results, write_result
from .retrieve import estimates, rank_queries

log = logging.getLogger("shoal")

QUERIES_AT_ONCE = 1024  # whose measures are computed together; 60 MB of the widest lists
VERSIONS = ("torch", "transformers", "faiss-cpu", "ray", "numpy")


def evaluate(config: EvaluateConfig) -> list[Result]:
    """Evaluate on every task, and write the results. Raises ShoalError before anything scales, for what cannot work."""
    system, works, output = ready(config)
    return [evaluate_task(config, system, work, output) for work in works]


def dry_run(config: EvaluateConfig) -> list[str]:
    """What an evaluation would compute, in lines: no result is written, and of the data no more than what was checked.

    Raises ShoalError as the evaluation itself would.
    """
    system, works, _ = ready(config)
    lines = []
    for work in works:
        for what, estimate in estimates(config, system, work):
            lines += [f"{work.task.name}: {what}", *(f"  {line}" for line in estimate.lines(config.price_per_hour))]
        if system.encoder and system.reranker:
            pairs = config.rerank_top * len(work.dataset.queries)
            lines.append(f"{work.task.name}: rerank {pairs:,} pairs of what is retrieved")
    return lines


def ready(config: EvaluateConfig) -> tuple[EvaluatedModels, list[TaskData], Folder]:
    """Models and data read, and held against what the output has already."""
    system = read_system(config)
    storage = parse_options(config.storage_option)
    output = Folder(absolute(config.output), storage)
    output.probe()
    works = read_works(config, system, storage)
    for work in works:
        check_same_results(output, system.name, work.task.name, identity(config, system, work))
    return system, works, output


def evaluate_task(config: EvaluateConfig, system: EvaluatedModels, work: TaskData, output: Folder) -> Result:
    """One task, from its data to the files of its result."""
    log.info(f"{work.task.name}: {len(work.dataset.qrels):,} judged queries, corpus {work.dataset.passages.url}")
    stages = StageLog(notes=list(work.dataset.notes))
    for note in stages.notes:
        log.info(f"  {note}")
    run = rank_queries(config, system, work, stages)
    with stages.timed("score"):
        values = score(work.dataset, run, work.task.ignore_identical_ids, stages)
    means, bounds = averaged(values)
    result = Result(
        system=system.name,
        task=work.task.name,
        split=work.task.split,
        main_score=work.task.main_score,
        scores=means,
        intervals=bounds,
        identity=identity(config, system, work),
        counts=stages.counts,
        notes=tuple(stages.notes),
        versions={name: version(name) for name in VERSIONS},
        seconds=stages.seconds,
    )
    write_result(output, result, work.task, list(work.dataset.qrels), values)
    return result


def score(
    dataset: Dataset, run: Iterable[pa.Table], ignore_identical_ids: bool, stages: StageLog
) -> dict[str, np.ndarray]:
    """Every measure of every judged query, float64, in the order of the qrels. A query that the run lacks scores 0.

    run: tables of RUN_SCHEMA that hold whole queries. Raises InputError for a score that is NaN.
    """
    place = {name: i for i, name in enumerate(dataset.qrels)}
    values = {name: np.zeros(len(place)) for name in NAMES}
    ranked = 0
    for table in run:
        table = table.filter(pc.is_valid(table[SCORE]))
        if ignore_identical_ids:
            table = table.filter(pc.not_equal(table[QUERY_ID], table[PASSAGE_ID]))
        queries = table[QUERY_ID].unique()
        ranked += len(queries)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            here = queries[start : start + QUERIES_AT_ONCE]
            number = pc.index_in(table[QUERY_ID], value_set=here)
            rows = pa.table({"query": number, "passage": table[PASSAGE_ID], "score": table[SCORE]}).drop_null()
            names = here.to_pylist()
            found = evaluate_block([dataset.qrels[query] for query in names], rows)
            for name in NAMES:
                values[name][[place[query] for query in names]] = found[name]
    stages.counts |= {"queries": len(place), "unranked": len(place) - ranked}
    return values


def identity(config: EvaluateConfig, system: EvaluatedModels, work: TaskData) -> dict[str, Any]:
    """What is evaluated, and how: two results that differ in it, names apart, are of two systems."""
    task = work.task
    said: dict[str, Any] = {"revision": system.revision, "dtype": config.dtype, "split": task.split, "data": work.data}
    said |= {"main_score": task.main_score, "ignore_identical_ids": task.ignore_identical_ids}
    if system.encoder:
        spec, prompts = system.encoder.spec, prompts_of(config, system.encoder, task)
        said |= {"model": spec.name, "recipe": config.recipe, "pooling": "+".join(spec.pooling), "dim": spec.dim}
        said |= {
            "max_tokens": spec.max_tokens,
            "query_prompt": prompts["queries"],
            "passage_prompt": prompts["passages"],
        }
    if system.reranker:
        said |= {"reranker": system.reranker.model.name, "reranker_recipe": config.reranker_recipe}
        said |= {"instruction": config.instruction, "reranker_max_tokens": system.reranker.limit}
        said["rerank_top"] = config.rerank_top if system.encoder else None
    return said

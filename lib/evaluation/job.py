"""Evaluate a model, a reranker or both on retrieval and reranking tasks, and file the results."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.job import versions
from ..engine.stage_log import StageLog
from ..index.exact.mappers import PASSAGE_ID, QUERY_ID, SCORE
from ..storage.folder import Folder
from .config import EvaluateConfig, check
from .dataset import Dataset
from .metrics import NAMES
from .metrics import evaluate as evaluate_block
from .models import EvaluatedModels, prompts_of, resolve_models
from .results import Result, averaged, check_same_results, write_result
from .retrieve import estimates, rank_queries
from .task_data import TaskData, read_tasks

log = logging.getLogger("shoal")

QUERIES_AT_ONCE = 1024  # queries whose measures are computed together; 60 MB of the widest lists
VERSIONS = ("torch", "transformers", "faiss-cpu", "ray", "numpy")


def evaluate(config: EvaluateConfig) -> list[Result]:
    """Evaluate on every task, and write the results. Raises ShoalError before anything scales, for what cannot work."""
    resolved = resolve(config)
    return [_evaluate_task(resolved, data) for data in resolved.tasks]


def dry_run(config: EvaluateConfig) -> list[str]:
    """Size and cost of an evaluation, in lines; no result is written, and the data is read only as far as it is checked.

    Raises ShoalError as the evaluation itself would.
    """
    resolved = resolve(config)
    models, lines = resolved.models, []
    for data in resolved.tasks:
        for stage, estimate in estimates(config, models, data):
            lines += [f"{data.task.name}: {stage}", *(f"  {line}" for line in estimate.lines(config.price_per_hour))]
        if models.encoder and models.reranker:
            pairs = config.rerank_top * len(data.dataset.queries)
            lines.append(f"{data.task.name}: rerank {pairs:,} pairs of what is retrieved")
    return lines


@dataclass(frozen=True)
class ResolvedEvaluation:
    """A config that was checked, with models and data read, and compared with the results in the output."""

    config: EvaluateConfig
    models: EvaluatedModels
    tasks: list[TaskData]
    output: Folder


def resolve(config: EvaluateConfig) -> ResolvedEvaluation:
    """Check the config, read models and data. Raises ShoalError for what cannot be evaluated."""
    check(config)
    models, output = resolve_models(config), config.folder
    output.probe()
    tasks = read_tasks(config, models)
    for data in tasks:
        check_same_results(output, models.name, data.task.name, identity(config, models, data))
    return ResolvedEvaluation(config, models, tasks, output)


def _evaluate_task(resolved: ResolvedEvaluation, data: TaskData) -> Result:
    """One task, from its data to the files of its result."""
    config, models = resolved.config, resolved.models
    log.info(f"{data.task.name}: {len(data.dataset.qrels):,} judged queries, corpus {data.dataset.passages.url}")
    stages = StageLog(notes=list(data.dataset.notes))
    for note in stages.notes:
        log.info(f"  {note}")
    rankings = rank_queries(config, models, data, stages)
    with stages.timed("score"):
        values = score(data.dataset, rankings, data.task.ignore_identical_ids, stages)
    means, bounds = averaged(values)
    result = Result(
        system=models.name,
        task=data.task.name,
        split=data.task.split,
        main_score=data.task.main_score,
        scores=means,
        intervals=bounds,
        identity=identity(config, models, data),
        counts=stages.counts,
        notes=tuple(stages.notes),
        versions=versions(*VERSIONS),
        seconds=stages.seconds,
    )
    write_result(resolved.output, result, data.task, list(data.dataset.qrels), values)
    return result


def score(
    dataset: Dataset, rankings: Iterable[pa.Table], ignore_identical_ids: bool, stages: StageLog
) -> dict[str, np.ndarray]:
    """Every measure of every judged query, float64, in the order of the qrels. A query without a ranking scores 0.

    rankings: tables of RANKING_SCHEMA that hold whole queries. Raises InputError for a score that is NaN.
    """
    places = {query: place for place, query in enumerate(dataset.qrels)}
    values = {name: np.zeros(len(places)) for name in NAMES}
    ranked = 0
    for table in rankings:
        table = table.filter(pc.is_valid(table[SCORE]))
        if ignore_identical_ids:
            table = table.filter(pc.not_equal(table[QUERY_ID], table[PASSAGE_ID]))
        queries = table[QUERY_ID].unique()
        ranked += len(queries)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            block = queries[start : start + QUERIES_AT_ONCE]
            number = pc.index_in(table[QUERY_ID], value_set=block)
            rows = pa.table({"query": number, "passage": table[PASSAGE_ID], "score": table[SCORE]}).drop_null()
            names = block.to_pylist()
            measures = evaluate_block([dataset.qrels[query] for query in names], rows)
            for name in NAMES:
                values[name][[places[query] for query in names]] = measures[name]
    stages.counts |= {"queries": len(places), "unranked": len(places) - ranked}
    return values


def identity(config: EvaluateConfig, models: EvaluatedModels, data: TaskData) -> dict[str, Any]:
    """The evaluated models, their options and the data: two results that differ in it, names apart, are of two systems."""
    task = data.task
    facts: dict[str, Any] = {
        "revision": models.revision,
        "dtype": config.model.dtype,
        "split": task.split,
        "data": data.digest,
        "main_score": task.main_score,
        "ignore_identical_ids": task.ignore_identical_ids,
    }
    if models.encoder:
        spec, prompts = models.encoder.spec, prompts_of(config, models.encoder, task)
        facts |= {
            "model": spec.name,
            "recipe": config.model.recipe,
            "pooling": "+".join(spec.pooling),
            "dim": spec.dim,
            "max_tokens": spec.max_tokens,
            "query_prompt": prompts["queries"],
            "passage_prompt": prompts["passages"],
        }
    if models.reranker:
        facts |= {
            "reranker": models.reranker.model.name,
            "reranker_recipe": config.second_stage.reranker_recipe,
            "instruction": config.instruction,
            "reranker_max_tokens": models.reranker.limit,
            "rerank_top": config.rerank_top if models.encoder else None,
        }
    return facts

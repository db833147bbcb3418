"""Build an index of vectors, or add what is new to one, and measure what it finds."""

import logging
from collections.abc import Callable
from typing import Any

from ..cli.units import format_bytes
from ..engine.actor_pool import shared_pool
from ..engine.cluster import connect
from ..engine.lease import ALL, hold_lease
from ..engine.stage_log import StageLog
from ..engine.workers import require_explicit_sizes
from ..errors import RunError
from .build.card import write_card
from .build.config import IndexBuild, IndexConfig, open_index_build
from .build.layout import TRAINED
from .build.recall_job import measure_recall
from .build.recall_queries import check_queries
from .build.segments_job import add, encode, merge
from .build.train_job import train
from .estimate.forecast import time_of
from .export.job import export

log = logging.getLogger("shoal")

FORESEEN = 1 << 33  # numbers in vectors: some 10 minutes of 2 cores


def build(config: IndexConfig) -> dict[str, Any]:
    """The card of the finished index. Raises ShoalError before anything scales, for what cannot work; and RunError in the end where
    the index finds less than --min-recall."""
    opened = open_index_build(config)
    with hold_lease(opened.folder, ALL) as still_held, shared_pool():
        card = _build(config, opened, still_held)
    most = max(row["recall@10"][0] for row in card["recall"])
    if config.min_recall and most < config.min_recall:
        raise RunError(
            f"recall@10 is {most:.4f} at most, under --min-recall {config.min_recall:g}. The index and its card are in "
            f"{opened.folder.url}; for more choose longer codes or more --lists, in a new --output"
        )
    return card


def _tell(opened: IndexBuild) -> None:
    """What is to come. Time is told of a build that takes so long that measuring its costs, some seconds, is no loss."""
    for sentence in opened.choice.why:
        log.info(sentence)
    log.info(f"{opened.rows:,} vectors take about {format_bytes(opened.choice.bytes)} of memory while the index serves")
    if opened.folder.exists(TRAINED):
        return
    if opened.rows * opened.vectors.dim < FORESEEN:
        log.info("--dry-run tells how long each stage takes")
    else:
        log.info(time_of(opened))


def _build(config: IndexConfig, opened: IndexBuild, still_held: Callable[[], None]) -> dict[str, Any]:
    stages = StageLog()
    check_queries(opened)
    connect()
    require_explicit_sizes(opened.options(config.input, opened.folder), weight_bytes=1)
    _tell(opened)
    train(opened, stages)
    with stages.timed("encode"):
        parts = encode(opened)
    still_held()
    with stages.timed("assemble"):
        manifest = add(opened, parts)
    if config.merge:
        with stages.timed("merge"):
            manifest = merge(opened, manifest, config.merge)
    if config.exports:
        with stages.timed("export"):
            export(opened, parts)
    still_held()
    with stages.timed("measure"):
        rows, queries = measure_recall(opened, manifest)
    still_held()
    return write_card(opened, manifest, parts, rows, queries, stages)

"""The driver of an index build: build an index of vectors, or add new vectors to one, and measure its recall."""

import logging
from collections.abc import Callable
from typing import Any

from ..cli.units import format_bytes
from ..engine.actor_pool import shared_pool
from ..engine.lease import ALL, hold_lease
from ..engine.stage_log import StageLog
from ..engine.workers import connect_for, require_explicit_sizes
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

# Numbers in vectors, from which on the build's time is estimated first: some 10 minutes of 2 cores.
ESTIMATED_NUMBERS = 1 << 33


def build(config: IndexConfig) -> dict[str, Any]:
    """The card of the finished index.

    Raises ShoalError before anything scales, for what cannot work; at the end RunError where recall is below --min-recall.
    """
    opened = open_index_build(config)
    with hold_lease(opened.folder, ALL) as check_lease, shared_pool():
        card = _build(opened, check_lease)
    highest = max(row["recall@10"][0] for row in card["recall"])
    if config.min_recall and highest < config.min_recall:
        raise RunError(
            f"recall@10 is {highest:.4f} at most, under --min-recall {config.min_recall:g}. The index and its card are in "
            f"{opened.folder.url}; for more choose longer codes or more --lists, in a new --output"
        )
    return card


def _log_plan(opened: IndexBuild) -> None:
    """Log the choice of the kind, and the time of a build that is long: measuring its costs takes some seconds."""
    for sentence in opened.choice.why:
        log.info(sentence)
    log.info(f"{opened.rows:,} vectors take about {format_bytes(opened.choice.bytes)} of memory while the index serves")
    if opened.folder.exists(TRAINED):
        return
    if opened.rows * opened.format.dim < ESTIMATED_NUMBERS:
        log.info("--dry-run tells how long each stage takes")
    else:
        log.info(time_of(opened))


def _build(opened: IndexBuild, check_lease: Callable[[], None]) -> dict[str, Any]:
    stages, config = StageLog(), opened.config
    check_queries(opened)
    connect_for(opened.workers)
    require_explicit_sizes(opened.workers, weight_bytes=1)
    _log_plan(opened)
    train(opened, stages)
    with stages.timed("encode"):
        parts = encode(opened)
    check_lease()
    with stages.timed("segments"):
        manifest = add(opened, parts)
    if config.merge:
        with stages.timed("merge"):
            manifest = merge(opened, manifest, config.merge)
    if config.exports:
        with stages.timed("export"):
            export(opened, parts)
    check_lease()
    with stages.timed("measure"):
        points, queries = measure_recall(opened, manifest)
    check_lease()
    return write_card(opened, manifest, parts, points, queries, stages)

"""Build an index of vectors, or add what is new to one, and measure what it finds."""

from collections.abc import Callable
from typing import Any

from ..cli.units import format_bytes
from ..engine.actor_pool import shared_pool
from ..engine.cluster import connect
from ..engine.lease import ALL, hold_lease
from ..engine.stage_log import Log, Say
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

FORESEEN = 1 << 33  # numbers in vectors: some 10 minutes of 2 cores


def build(config: IndexConfig, say: Say) -> dict[str, Any]:
    """The card of the finished index. Raises ShoalError before anything scales, for what cannot work; and RunError in the end where
    the index finds less than --min-recall."""
    opened = open_index_build(config)
    with hold_lease(opened.folder, ALL, say) as still_held, shared_pool():
        card = _build(config, opened, say, still_held)
    most = max(row["recall@10"][0] for row in card["recall"])
    if config.min_recall and most < config.min_recall:
        raise RunError(
            f"recall@10 is {most:.4f} at most, under --min-recall {config.min_recall:g}. The index and its card are in "
            f"{opened.folder.url}; for more choose longer codes or more --lists, in a new --output"
        )
    return card


def _tell(opened: IndexBuild, say: Say) -> None:
    """What is to come. Time is told of a build that takes so long that measuring its costs, some seconds, is no loss."""
    for sentence in opened.choice.why:
        say(sentence)
    say(f"{opened.rows:,} vectors take about {format_bytes(opened.choice.bytes)} of memory while the index serves")
    if opened.folder.exists(TRAINED):
        return
    if opened.rows * opened.vectors.dim < FORESEEN:
        say("--dry-run tells how long each stage takes")
    else:
        say(time_of(opened))


def _build(config: IndexConfig, opened: IndexBuild, say: Say, still_held: Callable[[], None]) -> dict[str, Any]:
    log = Log()
    check_queries(opened)
    connect()
    require_explicit_sizes(opened.options(config.input, opened.folder), weight_bytes=1)
    _tell(opened, say)
    train(opened, log, say)
    with log.timed("encode"):
        parts = encode(opened, say)
    still_held()
    with log.timed("assemble"):
        manifest = add(opened, parts, say)
    if config.merge:
        with log.timed("merge"):
            manifest = merge(opened, manifest, config.merge, say)
    if config.exports:
        with log.timed("export"):
            export(opened, parts, say)
    still_held()
    with log.timed("measure"):
        rows, queries = measure_recall(opened, manifest, say)
    still_held()
    return write_card(opened, manifest, parts, rows, queries, log)

"""The driver of a build's first half: the sample, then centroids and codec. A trained index is never trained again."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from ...engine.parts import Part, read_facts, read_manifest
from ...engine.run import Run
from ...engine.shuffle import bucket_plan
from ...engine.stage_files import StageFile, files_of, files_plan, grouped
from ...engine.stage_log import StageLog
from ...engine.workers import WorkerOptions, WorkerPlan, connect_for, largest_node_cpus
from ...errors import InputError
from ..kinds import FLAT_LISTS, to_spec
from .config import IndexBuild
from .layout import TRAINED
from .sample import SampleMapper, sample_plan
from .stage_parts import rows_of_shards
from .train import (
    MIN_CODEC_ROWS,
    MIN_POINTS,
    POINTS,
    ClusterCell,
    PartitionByCell,
    TrainCells,
    TrainMapper,
    TrainPlan,
    TwoLevels,
    shares,
    training_bytes,
)

log = logging.getLogger("shoal")

CODEC_POINTS = 65_536  # train a codec where the lists need fewer
LENGTHS = {
    "cosine": "they were made so. If the model is meant for products of vectors as they are, build with --metric ip",
    "ip": "products rank long vectors first. If cosines are wanted, build with --metric cosine",
}
OFF_UNIT = 0.01  # share of the sample: with more vectors of other lengths than 1, a warning


def train(build: IndexBuild, stages: StageLog) -> None:
    """Sample and train, unless that is done. Raises InputError for too few vectors.

    Where the stages were deleted the sample is drawn again, to measure drift; the trained index stays.
    """
    if not (build.folder.exists(TRAINED) and read_manifest(build.stage("train"))):
        with stages.timed("sample"):
            parts = sample(build)
        with stages.timed("train"):
            _train(build, parts)
    _warn_of_lengths(build, stages)


def wanted_rows(build: IndexBuild) -> int:
    """Vectors to train on."""
    return build.config.sample_rows or max(POINTS * build.choice.lists, CODEC_POINTS)


def has_two_levels(lists: int) -> bool:
    """Whether so many lists get their centroids in two levels of k-means."""
    return lists > FLAT_LISTS


def sample(build: IndexBuild) -> list[Part]:
    """The sample's parts."""
    rows, held_out = wanted_rows(build), build.held_out
    corpus = build.measure_input()

    def mapper(run: Run, workers: WorkerPlan) -> SampleMapper:
        shards = len(run.part_names())
        source = replace(build.source(run.columns), id_column=None)
        return SampleMapper(source, -(-rows // shards), -(-held_out // shards))

    plan = sample_plan(corpus, rows + held_out, build.format.dim)
    settings = {"job": "sample", "rows": rows, "held_out": held_out}
    folder = build.stage("sample")
    return build.run_stage(folder, "drawing the sample", mapper, plan, settings, columns=corpus.schema)


def held_out_rows(build: IndexBuild, parts: Sequence[Part]) -> int:
    """Vectors in parts of the sample that are not trained on."""
    return sum(fact["held_out"] for fact in read_facts(build.stage("sample"), parts))


def _warn_of_lengths(build: IndexBuild, stages: StageLog) -> None:
    """Warn of vectors whose products are no cosines."""
    folder = build.stage("sample")
    parts = read_manifest(folder)  # none where the stages were deleted
    rows = sum(part.rows for part in parts)
    facts = read_facts(folder, parts)
    share = sum(fact["off_unit"] * part.rows for fact, part in zip(facts, parts, strict=True)) / max(rows, 1)
    # Rounding to int8 alone moves the lengths of normalized vectors.
    rounded = build.format.encoder.get("normalized") and build.format.type == "int8"
    if build.config.metric != "l2" and share > OFF_UNIT and not rounded:
        note = f"{share:.0%} of the vectors are not of length 1: {LENGTHS[build.config.metric]}"
        stages.notes.append(note)
        log.warning(f"warning: {note}")


def _train(build: IndexBuild, parts: Sequence[Part]) -> None:
    rows = _training_rows(build, parts)
    plan = TrainPlan(build.kind, build.format.dim, _lists(build, rows), build.config.metric)
    files = files_of(build.stage("sample"), parts)
    centroids: tuple[str, ...] = ()
    if has_two_levels(plan.lists) and not build.folder.exists(TRAINED):
        levels = TwoLevels(plan.lists, plan.dim, len(files), rows)
        centroids, count = _two_levels(build, plan, files, levels)
        plan = replace(plan, lists=count)
        files = files[:: levels.codec_stride]
    build.run_stage(
        build.stage("train"),
        f"training {to_spec(build.kind)}" + (f", {plan.lists:,} lists" if plan.lists else ""),
        lambda run, workers: TrainMapper(plan, build.folder, workers.threads, centroids),
        files_plan([files]),
        {"job": "train"},
        weight_bytes=training_bytes(sum(file.rows for file in files), plan.dim),
        workers=one_worker(build),
    )


def _training_rows(build: IndexBuild, parts: Sequence[Part]) -> int:
    """Vectors of the sample to train on. Raises InputError for too few of them."""
    sampled = sum(part.rows for part in parts)
    rows = sampled - held_out_rows(build, parts)
    check_training_rows(build, rows, sampled)
    return rows


def check_training_rows(build: IndexBuild, rows: int, sampled: int) -> None:
    """Raise InputError for too few vectors to train on. sampled: with those that are held out."""
    if not rows:
        raise InputError(f"no row of the sample of {build.config.vectors.input} has a vector: see its column `error`")
    requested = build.choice.lists if build.config.lists or build.config.sample_rows else 0
    if rows < MIN_POINTS * requested:
        raise InputError(
            f"{rows:,} vectors to train on are too few for {requested:,} lists ({MIN_POINTS} a list): {sampled:,} rows of "
            f"the sample have one. Ask for --lists {max(1, rows // MIN_POINTS):,} or fewer, or a larger --sample-rows, "
            "with a new --output"
        )
    if build.kind.has_lists and rows < MIN_CODEC_ROWS:
        raise InputError(
            f"{rows:,} vectors to train on are too few for {to_spec(build.kind)}, which takes {MIN_CODEC_ROWS} at least. Use --kind "
            "flat, with a new --output"
        )


def _lists(build: IndexBuild, rows: int) -> int:
    """The number of lists, lowered when the sample has fewer vectors than expected (rows without a vector were counted)."""
    lists, config = build.choice.lists, build.config
    if not config.lists and not config.sample_rows and rows < MIN_POINTS * lists:
        lists = max(1, rows // POINTS)
        log.info(f"{lists:,} lists: {rows:,} rows of the sample have a vector to train on, {POINTS} for a list")
    return lists


def one_worker(build: IndexBuild) -> WorkerOptions:
    """One worker with all CPUs of the largest node."""
    connect_for(build.workers)
    return replace(build.workers, cpus_per_worker=largest_node_cpus(build.workers), max_workers=1, min_workers=1)


def _two_levels(
    build: IndexBuild, plan: TrainPlan, files: Sequence[StageFile], levels: TwoLevels
) -> tuple[tuple[str, ...], int]:
    """Centroids by cells: the paths of the parts with them, and their number."""
    cells, partitioned, folder = build.stage("cells"), build.stage("partitioned"), build.stage("centroids")
    build.run_stage(
        cells,
        f"{levels.cells:,} cells",
        lambda run, workers: TrainCells(plan, levels.cells, cells, workers.threads),
        files_plan([files[:: levels.cells_stride]]),
        {"job": "cells"},
        workers=one_worker(build),
    )
    build.run_stage(
        partitioned,
        "partitioning the sample by cell",
        lambda run, workers: PartitionByCell(plan, cells, workers.threads),
        files_plan(grouped(files, levels.parts_a_shard)),
        {"job": "partition"},
    )
    buckets, columns = bucket_plan({"partitioned": partitioned})
    counts = tuple(shares(rows_of_shards(buckets), plan.lists).tolist())
    parts = build.run_stage(
        folder,
        f"{plan.lists:,} centroids",
        lambda run, workers: ClusterCell(plan, counts, workers.threads, run.columns, build.storage),
        buckets,
        {"job": "centroids"},
        columns=columns,
    )
    return tuple(folder.path(part.part) for part in parts), sum(counts)

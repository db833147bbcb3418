"""The driver of a build's first half: the sample, then centroids and codec. What is trained is never trained again."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from ...data.corpus import Corpus, list_files, measure
from ...engine.cluster import connect
from ...engine.job import Job, carry_out_planned, require_complete
from ...engine.parts import Part, read_manifest
from ...engine.run import Run
from ...engine.shuffle import bucket_plan
from ...engine.stage_log import StageLog
from ...engine.workers import WorkerPlan, largest_node_cpus
from ...errors import InputError
from ..kinds import FLAT_LISTS, to_spec
from .config import IndexBuild, corpus_options
from .kmeans import COPIED
from .layout import TRAINED
from .sample import SampleMapper, sample_plan
from .stage_parts import File, facts_of, files_of, files_plan
from .train import (
    CELL_POINTS,
    CODEC_ROWS,
    LEAST_CODEC,
    LEAST_POINTS,
    POINTS,
    ClusterCell,
    PartitionByCell,
    TrainCells,
    TrainMapper,
    TrainPlan,
    cells_at_once,
    shares,
)
from .vector_source import Source

log = logging.getLogger("shoal")

CODEC_POINTS = 65_536  # train a codec where the lists ask for fewer
COPIES = 3  # of what trains the codec: as it was drawn, turned, and less the centroids
LENGTHS = {
    "cosine": "they were made so. If the model is meant for products of vectors as they are, build with --metric ip",
    "ip": "products rank long vectors first. If cosines are wanted, build with --metric cosine",
}
OFF_UNIT = 0.01  # of the sample: more vectors than these are not normalised


def train(build: IndexBuild, stages: StageLog) -> None:
    """Draw the sample and train on it, or find that done. Raises InputError for too few vectors.

    Where _build was deleted the sample is drawn again, to tell of drift; what was trained stays.
    """
    if not (build.folder.exists(TRAINED) and read_manifest(build.stage("train"))):
        with stages.timed("sample"):
            parts = draw(build)
        with stages.timed("train"):
            _train(build, parts)
    _tell_lengths(build, stages)


def source(build: IndexBuild, columns: pa.Schema, carried: tuple[str, ...] = ()) -> Source:
    """How the input's vectors are read."""
    config = build.config
    return Source(
        config.vector_column,
        build.id_column,
        carried,
        build.vectors.dim,
        config.metric == "cosine",
        build.vectors.reasons,
        columns,
        build.storage,
        build.vectors.ranges,
    )


def wanted_rows(build: IndexBuild) -> int:
    return build.config.sample_rows or max(POINTS * build.choice.lists, CODEC_POINTS)


def draw(build: IndexBuild) -> list[Part]:
    """The sample's parts."""
    rows, held = wanted_rows(build), build.held
    corpus = measure_input(build)

    def verb(ledger: Run, workers: WorkerPlan) -> SampleMapper:
        blocks = len(ledger.part_names())
        unnamed = replace(source(build, ledger.columns), id_column=None)
        return SampleMapper(unnamed, -(-rows // blocks), -(-held // blocks))

    job = Job("drawing the sample", {"verb": "sample", "rows": rows, "held": held, "of": build.key}, verb)
    folder = build.stage("sample")
    options = build.options(build.config.input, folder)
    outcome = carry_out_planned(
        job, options, lambda: (sample_plan(corpus, rows + held, build.vectors.dim), corpus.schema)
    )
    return require_complete(outcome, folder.url).parts


def measure_input(build: IndexBuild) -> Corpus:
    options = corpus_options(build.config)
    return measure(list_files(options, build.storage), options, build.storage, strict=True)


def _tell_lengths(build: IndexBuild, stages: StageLog) -> None:
    """Tell of vectors whose products are no cosines."""
    folder = build.stage("sample")
    parts = read_manifest(folder)  # none where _build was deleted
    rows = sum(part.rows for part in parts)
    facts = facts_of(folder, parts)
    share = sum(fact["off_unit"] * part.rows for fact, part in zip(facts, parts, strict=True)) / max(rows, 1)
    made = build.vectors.made.get("normalized") and build.vectors.type == "int8"  # rounding alone moves their lengths
    if build.config.metric != "l2" and share > OFF_UNIT and not made:
        note = f"{share:.0%} of the vectors are not of length 1: {LENGTHS[build.config.metric]}"
        stages.notes.append(note)
        log.info(f"warning: {note}")


def _train(build: IndexBuild, parts: Sequence[Part]) -> None:
    folder, rows = build.stage("sample"), _trainable(build, parts)
    plan = TrainPlan(build.kind, build.vectors.dim, _lists(build, rows), build.config.metric)
    files = files_of(folder, parts)
    centroids: tuple[str, ...] = ()
    if plan.lists > FLAT_LISTS and not build.folder.exists(TRAINED):
        centroids, count = _two_levels(build, plan, parts, rows)
        plan = replace(plan, lists=count)
        files = files[:: max(1, rows // CODEC_ROWS)]  # only the codec is left to train
    said = f"training {to_spec(build.kind)}" + (f", {plan.lists:,} lists" if plan.lists else "")

    def verb(ledger: Run, workers: WorkerPlan) -> TrainMapper:
        return TrainMapper(plan, build.folder, workers.threads, build.storage, centroids)

    rows = sum(file.rows for file in files)
    held = int(4 * plan.dim * ((1 + COPIED) * rows + COPIES * min(rows, CODEC_ROWS)))
    job = Job(said, {"verb": "train", "of": build.key}, verb, weight_bytes=held)
    _on_one_worker(build, job, "train", [files])


def _trainable(build: IndexBuild, parts: Sequence[Part]) -> int:
    """Vectors of the sample that are there to train on. Raises InputError where they are too few."""
    there = sum(part.rows for part in parts)
    rows = there - sum(fact["held"] for fact in facts_of(build.stage("sample"), parts))
    if not rows:
        raise InputError(f"no row of the sample of {build.config.input} has a vector. Look at its column `error`")
    asked = build.choice.lists if build.config.lists or build.config.sample_rows else 0
    if rows < LEAST_POINTS * asked:
        raise InputError(
            f"{rows:,} vectors to train on are too few for {asked:,} lists ({LEAST_POINTS} a list): {there:,} rows of "
            f"the sample have one. Ask for --lists {max(1, rows // LEAST_POINTS):,} or fewer, or a larger --sample-rows, "
            "with a new --output"
        )
    if build.kind.has_lists and rows < LEAST_CODEC:
        raise InputError(
            f"{rows:,} vectors to train on are too few for {to_spec(build.kind)}, which takes {LEAST_CODEC} at least. Use --kind "
            "flat, with a new --output"
        )
    return rows


def _lists(build: IndexBuild, rows: int) -> int:
    """What was asked for or chosen; by itself no more than so many vectors train: rows without one were counted in."""
    lists, config = build.choice.lists, build.config
    if not config.lists and not config.sample_rows and rows < LEAST_POINTS * lists:
        lists = max(1, rows // POINTS)
        log.info(f"{lists:,} lists: {rows:,} rows of the sample have a vector to train on, {POINTS} for a list")
    return lists


def _on_one_worker(build: IndexBuild, job: Job, name: str, groups: Sequence[Sequence[File]]) -> None:
    """A stage of one shard, on all cores of the largest node."""
    connect()
    folder = build.stage(name)
    cpus = largest_node_cpus(build.config)
    options = build.options(build.stage("sample").url, folder, cpus_per_worker=cpus, max_workers=1, min_workers=1)
    require_complete(carry_out_planned(job, options, lambda: files_plan(groups)), folder.url)


def _two_levels(build: IndexBuild, plan: TrainPlan, parts: Sequence[Part], rows: int) -> tuple[tuple[str, ...], int]:
    """Centroids by cells: the paths of the parts that hold them, and how many there are."""
    sample = build.stage("sample")
    files = files_of(sample, parts)
    cells = 2 ** round(plan.lists.bit_length() / 2)
    taken = files[:: max(1, rows // (cells * CELL_POINTS))]

    def first(ledger: Run, workers: WorkerPlan) -> TrainCells:
        return TrainCells(plan, cells, build.stage("cells"), workers.threads, build.storage)

    _on_one_worker(build, Job(f"{cells:,} cells", {"verb": "cells", "of": build.key}, first), "cells", [taken])

    def deal(ledger: Run, workers: WorkerPlan) -> PartitionByCell:
        return PartitionByCell(plan, build.stage("cells"), workers.threads, build.storage)

    dealt = build.stage("dealt")
    job = Job("dealing the sample by cell", {"verb": "deal", "of": build.key}, deal)
    count = cells_at_once(len(files), rows, plan.dim)
    groups = [files[start : start + count] for start in range(0, len(files), count)]
    require_complete(carry_out_planned(job, build.options(sample.url, dealt), lambda: files_plan(groups)), dealt.url)
    buckets, columns = bucket_plan({"dealt": dealt})
    points = buckets.group_by("shard", use_threads=False).aggregate([("rows", "sum")])["rows_sum"].to_numpy()
    given = tuple(shares(points, plan.lists).tolist())

    def cluster(ledger: Run, workers: WorkerPlan) -> ClusterCell:
        return ClusterCell(plan, given, workers.threads, ledger.columns, build.storage)

    folder = build.stage("centroids")
    job = Job(f"{plan.lists:,} centroids", {"verb": "centroids", "of": build.key}, cluster)
    outcome = carry_out_planned(job, build.options(dealt.url, folder), lambda: (buckets, columns))
    made = require_complete(outcome, folder.url).parts
    return tuple(folder.path(part.part) for part in made), sum(given)

"""Every stage of a build that is not there yet, in numbers: of the functions that plan them, and of measured costs.

Memory is reckoned of what a stage is known to hold, beside WORKER_BASE: an estimate. So are the seconds.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...data.formats.parquet import ROWS_PER_TABLE
from ...data.shards import cut_shards
from ...engine.job import even_rows
from ...engine.parts import Part
from ...engine.workers import WORKER_BASE
from ...errors import InputError
from ..build.kmeans import COPIED
from ..build.recall import MAX_CUT
from ..build.recall_job import PARTS_AT_ONCE
from ..build.sample import sample_plan
from ..build.segments import LIST_BYTES, group_parts
from ..build.segments_job import balance
from ..build.train import CELL_POINTS, CODEC_ROWS, MIN_POINTS, parts_of_partition
from ..build.train_job import COPIES, wanted_rows
from ..build.vector_source import SHARD_BYTES
from ..kinds import FLAT_LISTS, search_parameter_values
from .stage import EstimateInputs, StageEstimate, decoded, deeper, shard_rows, stored

RUN_OBJECTS = 3  # of each stage: its record, its plan, its manifest
CARD_OBJECTS = 3  # card.json, README.md, curve.svg
HELD_TWICE = 2  # a trained index, as bytes and as faiss holds it; a list of codes while it grows
COPIES_READ = 3  # of vectors that are read: as they lie, as numbers, turned
PLACE_BYTES = 8 + 4 + 4 + 4  # of a list: a number, a score, an effort, a query
MERGE_PASSES = 3  # over a piece's bytes: fetched, copied list by list, put


def stages_of(given: EstimateInputs) -> tuple[list[StageEstimate], list[float]]:
    """Every stage in order, and the bytes of each piece. Raises InputError for a sample that is too small to train on."""
    first, drawn = _sample(given)
    encoded, rows = _encode(given)
    parts = [Part(number, "", 0, 0, "", count, count, 0, 0, 0) for number, count in enumerate(rows.tolist())]
    groups = [
        sum(part.rows for part in group)
        for group in group_parts(parts, given.code, given.trained, given.build.config.merge or 1)
    ]
    pieces = [count * given.code + given.trained for count in groups]
    merged = [_merge(given, groups)] if given.build.config.merge else []
    found = [first, *_training(given, drawn), encoded, _assemble(given, groups, len(parts)), *merged]
    return [*found, *_measure(given, encoded, groups, int(rows.max()))], pieces


def _sample(given: EstimateInputs) -> tuple[StageEstimate, np.ndarray]:
    """And the vectors to train on that each of its parts has."""
    build, costs = given.build, given.costs
    wanted, held = wanted_rows(build), build.held_out
    plan = sample_plan(given.corpus, wanted + held, given.build.format.dim)
    rows = shard_rows(plan)
    kept = np.minimum(-(-held // len(rows)), rows // 10)
    drawn = np.minimum(-(-wanted // len(rows)), rows - kept)
    read, written = decoded(plan, given.corpus), float((drawn + kept).sum() * given.vector)
    stage = StageEstimate(
        name="sample",
        shards=len(rows),
        read=read,
        written=written,
        objects=len(rows) + RUN_OBJECTS + 1,  # the build's own record
        memory=WORKER_BASE + COPIES_READ * SHARD_BYTES,
        seconds=read * costs.read + written * costs.put,
        workers=given.find(0, False),
        slices=plan.num_rows,
    )
    return stage, drawn


def _training(given: EstimateInputs, drawn: np.ndarray) -> list[StageEstimate]:
    """One k-means over the sample; or, above FLAT_LISTS, those that lead to the centroids first."""
    costs, rows, lists = given.costs, float(drawn.sum()), given.lists
    if rows < MIN_POINTS * lists:
        raise InputError(
            f"{rows:,.0f} vectors to train on are too few for {lists:,} lists ({MIN_POINTS} a list). Ask for --lists "
            f"{max(1, int(rows // MIN_POINTS)):,} or fewer, or a larger --sample-rows"
        )
    size = rows * given.vector
    two = lists > FLAT_LISTS
    taken = min(rows, 2.0 * CODEC_ROWS) if two else rows
    coded = min(taken, costs.codec_rows, CODEC_ROWS)
    copied = COPIES * min(taken, CODEC_ROWS)
    seconds = size * costs.read + coded * (costs.codec + costs.assigned(lists) * (lists > 0))
    last = StageEstimate(
        name="train",
        shards=1,
        read=size + (lists * given.vector if two else 0),
        written=given.trained,
        objects=1 + RUN_OBJECTS + 1,  # the trained index
        memory=WORKER_BASE + (1 + COPIED) * size + copied * given.vector + HELD_TWICE * given.trained,
        seconds=seconds + (0.0 if two else given.kmeans(rows, lists)),
        workers=given.find(size, True),
        slices=len(drawn),
        alone=lists * costs.linked(lists) if two else 0.0,
        node=True,
    )
    return [*_two_levels(given, drawn), last] if two else [last]


def _two_levels(given: EstimateInputs, drawn: np.ndarray) -> list[StageEstimate]:
    """As training.py has them: cells of a part of the sample, the sample dealt by cell, and k-means in each cell."""
    costs, rows, lists = given.costs, float(drawn.sum()), given.lists
    cells = 2 ** round(lists.bit_length() / 2)
    at_once = parts_of_partition(len(drawn), rows, given.build.format.dim)
    parts = -(-len(drawn) // at_once)
    some = drawn[:: max(1, int(rows) // (cells * CELL_POINTS))]
    taken = float(some.sum())
    size, each = rows * given.vector, rows / cells
    one, many = given.find(0, True), given.find(0, False)
    near = rows * cells * given.build.format.dim * costs.product
    return [
        StageEstimate(
            name="train: cells",
            shards=1,
            read=taken * given.vector,
            written=float(cells * given.vector),
            objects=1 + RUN_OBJECTS + 1,  # the cells' centroids
            memory=WORKER_BASE + (2 + COPIED) * taken * given.vector,
            seconds=taken * given.vector * costs.read + given.kmeans(taken, cells),
            workers=one,
            slices=len(some),
            node=True,
        ),
        StageEstimate(
            name="train: deal",
            shards=parts,
            read=size,
            written=size,
            objects=parts + RUN_OBJECTS,
            memory=WORKER_BASE + COPIES_READ * float(drawn.max()) * at_once * given.vector,
            seconds=size * (costs.read + costs.put) + near,
            workers=many,
            slices=len(drawn),
        ),
        StageEstimate(
            name="train: centroids",
            shards=cells,
            read=size,
            written=float(lists * given.vector),
            objects=cells + RUN_OBJECTS,
            memory=WORKER_BASE + (COPIES_READ + COPIED) * each * given.vector,
            seconds=size * costs.read + cells * given.kmeans(each, lists / cells),
            workers=many,
            slices=cells * parts,  # a range of rows in each dealt part
        ),
    ]


def _encode(given: EstimateInputs) -> tuple[StageEstimate, np.ndarray]:
    """And the rows of each of its shards."""
    build, costs, corpus = given.build, given.costs, given.corpus
    workers = given.find(HELD_TWICE * given.trained, False)
    most = max(1, SHARD_BYTES // given.vector)
    count = 1 if isinstance(workers, str) else workers.maximum
    plan = cut_shards(corpus, build.config.vectors.shard_rows or even_rows(corpus, count, most))
    rows = shard_rows(plan)
    read = decoded(plan, corpus)
    carried = max(0.0, corpus.row_bytes - stored(given)) if build.config.vectors.keep_columns else 0.0
    seconds = read * costs.read + float(rows.sum()) * costs.assigned(given.lists) * build.kind.has_lists
    batch = min(ROWS_PER_TABLE, int(rows.max())) * given.vector
    stage = StageEstimate(
        name="encode",
        shards=len(rows),
        read=read,
        written=corpus.rows * (costs.row + carried),
        objects=len(rows) + RUN_OBJECTS,
        memory=WORKER_BASE + HELD_TWICE * (given.trained + float(rows.max()) * costs.row) + COPIES_READ * batch,
        seconds=seconds + corpus.rows * (costs.encode + costs.write),
        workers=workers,
        slices=plan.num_rows,
    )
    return stage, rows


def _assemble(given: EstimateInputs, groups: Sequence[int], parts: int) -> StageEstimate:
    costs, rows = given.costs, given.corpus.rows
    largest, repeated = max(groups) * given.code, float(len(groups) * given.trained)
    return StageEstimate(
        name="assemble",
        shards=len(groups),
        read=rows * given.code,
        written=rows * given.code + repeated,
        objects=2 * len(groups) + RUN_OBJECTS + 1,  # a piece, and the part that tells of it; the manifest
        memory=WORKER_BASE + HELD_TWICE * (given.trained + largest),
        seconds=rows * costs.fill * deeper(given, max(groups)) + repeated * costs.repeat,
        workers=given.find(largest, False),
        slices=parts,
    )


def _merge(given: EstimateInputs, groups: Sequence[int]) -> StageEstimate:
    shards = balance([{"vectors": rows} for rows in groups], given.build.config.merge or 1)
    count = len(shards)
    codes = given.corpus.rows * given.code
    read = codes + len(groups) * given.trained
    return StageEstimate(
        name="merge",
        shards=count,
        read=read,
        written=codes + count * given.trained,
        objects=3 * count + RUN_OBJECTS,  # an index, its lists, and the part that tells of them
        memory=WORKER_BASE + HELD_TWICE * given.trained + LIST_BYTES * given.lists * max(map(len, shards)),
        seconds=MERGE_PASSES * read * given.costs.put,
        workers=given.find(0, False),
        slices=len(groups),
    )


def _measure(given: EstimateInputs, encoded: StageEstimate, groups: Sequence[int], largest: int) -> list[StageEstimate]:
    """Exact search of the held queries over all vectors, and the pieces' own at every effort. largest: rows of a shard."""
    build, costs, rows = given.build, given.costs, given.corpus.rows
    queries, ladder = build.config.recall_queries, search_parameter_values(build.kind, given.lists)
    workers, listed = given.find(0, False), queries * (MAX_CUT + 1)  # places of the lists that a shard leaves
    shards, pieces, tried = encoded.shards, len(groups), len(ladder)
    if build.kind.has_lists:
        look = sum(costs.probed(given.lists, effort) for effort in ladder)
        probed = queries * (pieces * look + sum(ladder) / given.lists * rows * costs.scan)
    elif build.kind.search_parameter:
        probed = queries * pieces * costs.scan * deeper(given, max(groups))
    else:
        probed = queries * rows * costs.scan
    exact = StageEstimate(
        name="measure: exact",
        shards=shards,
        read=encoded.read,
        written=shards * listed * costs.place,
        objects=shards + RUN_OBJECTS + 2,  # the queries, and what was found
        memory=WORKER_BASE + (COPIES_READ + 1) * largest * given.vector,
        seconds=encoded.read * costs.read + rows * queries * costs.truth + shards * listed * costs.told,
        workers=workers,
        slices=encoded.slices,
    )
    found = pieces * listed * tried
    probe = StageEstimate(
        name="measure: probe",
        shards=pieces,
        read=rows * given.code + pieces * given.trained,
        written=found * costs.place,
        objects=pieces + RUN_OBJECTS + CARD_OBJECTS,
        memory=WORKER_BASE + given.trained + listed * tried * PLACE_BYTES,
        seconds=probed + found * costs.told,
        workers=workers,
        slices=pieces,
    )
    return [*_shortened(given, probe, listed * tried), *_shortened(given, exact, listed)]


def _shortened(given: EstimateInputs, stage: StageEstimate, listed: int) -> list[StageEstimate]:
    """A stage that leaves parts of so many places, and the maps that leave few enough of them for the driver."""
    costs, parts, levels = given.costs, stage.shards, []
    while parts > PARTS_AT_ONCE:
        levels.append(parts)
        parts = -(-parts // PARTS_AT_ONCE)
    stages = [stage]
    for level, before in enumerate(levels):
        made = -(-before // PARTS_AT_ONCE)
        stages.append(
            StageEstimate(
                name=f"{stage.name} lists" + (f", {level + 1}" if level else ""),
                shards=made,
                read=before * listed * costs.place,
                written=made * listed * costs.place,
                objects=made + RUN_OBJECTS,
                memory=WORKER_BASE + COPIES_READ * listed * PLACE_BYTES,
                seconds=before * listed * costs.met + made * listed * costs.told,
                workers=stage.workers,
                slices=before,
            )
        )
    stages[-1] = replace(stages[-1], alone=parts * listed * costs.met)
    return stages

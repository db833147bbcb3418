"""The training sample: rows drawn evenly over the whole input, the same ones each time."""

import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.corpus import Corpus
from ...data.formats import Measure
from ...data.shards import PLAN_SCHEMA, count_shards, cut_shards
from ...engine.mapper import Tables
from ...engine.parts import GROUPS
from .layout import FACTS, FILE, HELD, ROW, VECTOR
from .stage_parts import PATHS, OfParts, column, shard_of
from .vector_source import SHARD_BYTES, Source, off_unit

BLOCK = 4096  # rows that are read together, and of which some are drawn
LEAST_BLOCKS = 64
DEEP = 8  # blocks: such row groups, of 32,768 rows, are the embed job's
READ = 2  # rows that are read for one that is drawn, where the input is large: order in a file must not decide


def sample_plan(corpus: Corpus, rows: int, dim: int) -> pa.Table:
    """Shards of the blocks that are read, evenly over the input; enough of them that `rows` can be drawn.

    Of a row group all that lies before a block is decoded, too: in an input of short groups, as the embed job's, those are
    preferred that lie near the beginning. In long groups order may decide, and blocks lie evenly.
    """
    blocks = cut_shards(corpus, BLOCK)
    there = count_shards(blocks)
    count = min(there, max(LEAST_BLOCKS, -(-rows * READ // BLOCK)))
    depths = _depths(blocks, corpus)
    short = there > 0 and depths.max() < DEEP
    near = np.flatnonzero(depths <= np.sort(depths)[count - 1]) if short else np.arange(there)
    chosen = near[np.unique(np.linspace(0, len(near) - 1, count).round().astype(np.int64))]
    plan = blocks.filter(pc.is_in(blocks["shard"], pa.array(chosen)))
    places = pc.index_in(plan["shard"], pa.array(chosen)).to_numpy().astype(np.int64)
    shards = -(-len(chosen) * BLOCK * 4 * dim // SHARD_BYTES)
    numbers = pa.array(places * min(shards, len(chosen)) // max(len(chosen), 1))
    return _joined(plan.set_column(0, PLAN_SCHEMA.field(0), numbers))


def _joined(plan: pa.Table) -> pa.Table:
    """The plan with one slice for those that follow each other in a file and a shard: each slice is decoded by itself."""
    joined: list[dict[str, Any]] = []
    for row in plan.to_pylist():
        last = joined[-1] if joined else {}
        if [last.get(name) for name in ("shard", "path", "stop")] == [row["shard"], row["path"], row["start"]]:
            last |= {"stop": row["stop"], "rows": last["rows"] + row["rows"]}
        else:
            joined.append(row)
    return pa.Table.from_pylist(joined, plan.schema)


def _depths(blocks: pa.Table, corpus: Corpus) -> np.ndarray:
    """Blocks that lie before each one in its row group, int64 [shards]."""
    breaks = {f.path: m.breaks for f, m in zip(corpus.files, corpus.measures, strict=True) if isinstance(m, Measure)}
    found: dict[int, int] = {}
    for shard, path, start in zip(*(blocks[name].to_pylist() for name in ("shard", "path", "start")), strict=True):
        place = bisect_right(breaks.get(path, ()), start)
        found.setdefault(shard, (start - (breaks[path][place - 1] if place else 0)) // BLOCK)
    return np.array(list(found.values()), np.int64)


@dataclass(frozen=True)
class SampleMapper(OfParts):
    """The verb: `draw` of a shard's vectors to train on, and of the others `hold` to ask for; a tenth of what there is at most.

    A part has VECTOR, FILE and ROW, where it lies, and HELD.
    """

    source: Source
    draw: int
    hold: int

    def worker(self) -> Callable[[Tables], Tables]:
        return self._work

    def _work(self, bundle: Tables) -> Tables:
        shard = shard_of(bundle[PATHS])
        rows = self.source.read(shard)
        places = np.random.default_rng(int(shard.key, 16)).permutation(np.flatnonzero(rows.good))
        held = min(self.hold, len(places) // 10)
        places = places[: held + self.draw]
        sizes = [piece.rows for piece in shard.ranges]
        slices = pa.array(np.repeat(np.arange(len(sizes)), sizes)[places])
        files = pa.array([piece.path for piece in shard.ranges], pa.string()).take(slices)
        lines = np.concatenate([np.arange(piece.start, piece.stop) for piece in shard.ranges])
        data = {
            VECTOR: column(rows.vectors[places]),
            FILE: files,
            ROW: lines[places],
            HELD: np.arange(len(places)) < held,
        }
        facts = {"off_unit": off_unit(rows.lengths[places]), "good": int(rows.good.sum()), "held": held}
        groups = json.dumps([held, len(places) - held])  # what is held out is read alone, in the end
        return {"rows": pa.table(data).replace_schema_metadata({FACTS: json.dumps(facts), GROUPS: groups})}

"""The training sample: rows spread evenly over the whole input, the same ones each time."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.corpus import Corpus
from ...data.formats import Measure
from ...data.shards import PLAN_SCHEMA, Shard, count_shards, cut_shards
from ...engine.mapper import FusedMapper, Result
from .layout import FILE, HELD_OUT, ROW, VECTOR
from .stage_parts import binary_column
from .vector_source import SHARD_BYTES, VectorSource, off_unit_share

BLOCK = 4096  # rows that are read together; a part of them is sampled
MIN_BLOCKS = 64
SHORT_GROUP = 8  # blocks of a row group, at most: the embed job's row groups have 32,768 rows
ROWS_READ = 2  # rows read for one that is sampled, in a large input: the order within a file must not decide


def sample_plan(corpus: Corpus, rows: int, dim: int) -> pa.Table:
    """Shards of blocks spread evenly over the input, enough of them to sample `rows` rows.

    Reading a block decodes everything before it in its row group. So where all row groups are short, as the embed job's, blocks
    near the beginnings of row groups are preferred. In long row groups the order of rows may decide, and blocks are spread evenly.
    """
    blocks = cut_shards(corpus, BLOCK)
    total = count_shards(blocks)
    count = min(total, max(MIN_BLOCKS, -(-rows * ROWS_READ // BLOCK)))
    firsts = np.unique(blocks["shard"], return_index=True)[1]
    depths = rows_before(blocks, corpus)[firsts] // BLOCK  # of each block in its row group
    short = total > 0 and depths.max() < SHORT_GROUP
    near = np.flatnonzero(depths <= np.sort(depths)[count - 1]) if short else np.arange(total)
    chosen = near[np.unique(np.linspace(0, len(near) - 1, count).round().astype(np.int64))]
    plan = blocks.filter(pc.is_in(blocks["shard"], pa.array(chosen)))
    places = pc.index_in(plan["shard"], pa.array(chosen)).to_numpy().astype(np.int64)
    shards = -(-len(chosen) * BLOCK * 4 * dim // SHARD_BYTES)
    numbers = pa.array(places * min(shards, len(chosen)) // max(len(chosen), 1))
    return _joined(plan.set_column(0, PLAN_SCHEMA.field(0), numbers))


def _joined(plan: pa.Table) -> pa.Table:
    """The plan with neighbouring ranges of a file and shard joined to one: each range is decoded by itself."""
    joined: list[dict[str, Any]] = []
    for row in plan.to_pylist():
        last = joined[-1] if joined else {}
        if [last.get(name) for name in ("shard", "path", "stop")] == [row["shard"], row["path"], row["start"]]:
            last |= {"stop": row["stop"], "rows": last["rows"] + row["rows"]}
        else:
            joined.append(row)
    return pa.Table.from_pylist(joined, plan.schema)


def rows_before(plan: pa.Table, corpus: Corpus) -> np.ndarray:
    """int64 [ranges]: the rows between the beginning of a row group and each range of a plan: reading decodes them too."""
    breaks = {
        f.path: (0, *m.breaks) for f, m in zip(corpus.files, corpus.measures, strict=True) if isinstance(m, Measure)
    }
    ranges = zip(plan["path"].to_pylist(), plan["start"].to_pylist(), strict=True)
    groups = [breaks[path][bisect_right(breaks[path], start) - 1] for path, start in ranges]
    return plan["start"].to_numpy() - np.array(groups, np.int64)


def sample_sizes(vectors: np.ndarray, training: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of vectors that are held out and that are trained on, of shards with so many vectors."""
    kept = np.minimum(held_out, vectors // 10)
    return kept, np.minimum(training, vectors - kept)


@dataclass(frozen=True)
class SampleMapper(FusedMapper):
    """A shard of vectors -> a random sample of them: VECTOR, its FILE and ROW, and HELD_OUT.

    training: vectors of a shard to train on. held_out: vectors to measure recall with, at most a tenth of the shard. A part's
    held-out rows come first and are a row group of their own, which is read alone. Facts: `held_out`, their number; `off_unit`, the
    share of vectors not of length 1.
    """

    source: VectorSource
    training: int
    held_out: int

    def load(self) -> Callable[[Shard], Result]:
        return self._sample

    def _sample(self, shard: Shard) -> Result:
        rows = self.source.read(shard)
        places = np.random.default_rng(int(shard.key, 16)).permutation(np.flatnonzero(rows.valid))
        held_out, training = map(int, sample_sizes(np.array(len(places)), self.training, self.held_out))
        places = places[: held_out + training]
        ranges = pa.array(np.repeat(np.arange(len(shard.ranges)), [each.rows for each in shard.ranges])[places])
        file_rows = np.concatenate([np.arange(each.start, each.stop) for each in shard.ranges])
        table = pa.table(
            {
                VECTOR: binary_column(rows.vectors[places]),
                FILE: pa.array([each.path for each in shard.ranges], pa.string()).take(ranges),
                ROW: file_rows[places],
                HELD_OUT: np.arange(len(places)) < held_out,
            }
        )
        facts = {"off_unit": off_unit_share(rows.lengths[places]), "held_out": held_out}
        return Result(table, facts=facts, groups=[held_out, len(places) - held_out])

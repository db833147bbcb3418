"""The training sample: rows drawn evenly over the whole input, the same ones each time."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..corpus import Corpus
from ..parts import GROUPS
from ..plan import PLAN_SCHEMA, Shard, count_shards, cut
from ..stages import Bundle
from . import FACTS, FILE, HELD, ROW, VECTOR
from .source import Source, off_unit

BLOCK = 8192  # rows that are read together, and of which some are drawn
LEAST_BLOCKS = 64
READ = 4  # rows that are read for one that is drawn, where the input is large: order in a file must not decide


def sample_plan(corpus: Corpus, rows: int) -> pa.Table:
    """A shard for each block that is read, evenly over the input; enough of them that `rows` can be drawn."""
    blocks = cut(corpus, BLOCK)
    there = count_shards(blocks)
    count = min(there, max(LEAST_BLOCKS, -(-rows * READ // BLOCK)))
    chosen = np.unique(np.linspace(0, there - 1, count).round().astype(np.int64))
    plan = blocks.filter(pc.is_in(blocks["shard"], pa.array(chosen)))
    numbers = pc.index_in(plan["shard"], pa.array(chosen)).cast(pa.int64())
    return plan.set_column(0, PLAN_SCHEMA.field(0), numbers)


@dataclass(frozen=True)
class Sample:
    """The verb: `draw` of a shard's vectors to train on, and of the others `hold` to ask for; a tenth of what there is at most.

    A part has VECTOR, FILE and ROW, where it lies, and HELD.
    """

    source: Source
    draw: int
    hold: int

    def prepare(self, shard: Shard) -> tuple[Bundle, dict[str, float]]:
        began = time.perf_counter()
        rows = self.source.read(shard)
        places = np.random.default_rng(int(shard.key, 16)).permutation(np.flatnonzero(rows.good))
        held = min(self.hold, len(places) // 10)
        places = places[: held + self.draw]
        drawn = rows.vectors[places]
        column = pa.FixedSizeListArray.from_arrays(pa.array(drawn.reshape(-1)), self.source.dim)
        files = np.repeat([piece.path for piece in shard.slices], [piece.rows for piece in shard.slices])
        lines = np.concatenate([np.arange(piece.start, piece.stop) for piece in shard.slices])
        data = {VECTOR: column, FILE: files[places], ROW: lines[places], HELD: np.arange(len(places)) < held}
        facts = {"off_unit": off_unit(rows.lengths[places]), "good": int(rows.good.sum()), "held": held}
        groups = json.dumps([held, len(places) - held])  # what is held out is read alone, in the end
        table = pa.table(data).replace_schema_metadata({FACTS: json.dumps(facts), GROUPS: groups})
        return {"rows": table}, {"read": time.perf_counter() - began}

    def worker(self) -> Callable[[Bundle], Bundle]:
        return lambda bundle: bundle

    def finish(self, shard: Shard, bundle: Bundle) -> tuple[pa.Table, dict[str, int]]:
        return bundle["rows"], {"rows": bundle["rows"].num_rows, "source_rows": shard.rows}

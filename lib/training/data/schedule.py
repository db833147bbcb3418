"""The order in which a training plan's batches are taken: epoch by epoch, each shuffled, each dataset by its weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from .batch_reader import SCHEMA
from .batches import generator


@dataclass
class Stream:
    """All batches of one dataset of one entry: for each pass, their parts' numbers and row groups, int32 [batches, 2]."""

    entry: str
    dataset: str
    in_batch: bool
    weight: float
    passes: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, number: int, part: int, groups: Sequence[int]) -> None:
        """The row groups of one part, which is of pass `number`."""
        pairs = np.column_stack([np.full(len(groups), part), groups])
        self.passes.setdefault(number, []).append(pairs.astype(np.int32))

    def batches(self, number: int) -> np.ndarray:
        return np.concatenate([np.zeros((0, 2), np.int32), *self.passes.get(number, [])])


def passes_of(weight: float, epochs: int) -> int:
    """The number of passes over a dataset that all epochs take."""
    return max(1, math.ceil(round(epochs * weight, 9)))


def epochs_of(stream: Stream, epochs: int, seed: int) -> list[np.ndarray]:
    """The batches of each epoch, int32 [batches, 2]. An epoch takes `weight` passes over the dataset, which may be a fraction, and
    continues where the epoch before it stopped.

    A pass's batches are shuffled first, so that a part of a pass is a random part of it.
    """
    passes = [stream.batches(number) for number in range(passes_of(stream.weight, epochs))]
    for number, batches in enumerate(passes):
        generator(seed, "pass", number, stream.entry, stream.dataset, stream.in_batch).shuffle(batches)
    ends = np.concatenate([[0], np.cumsum([len(each) for each in passes])])

    def place(epoch: int) -> int:
        whole, part = divmod(round(epoch * stream.weight, 9), 1)
        rest = math.floor(part * len(passes[int(whole)]) + 0.5) if part else 0
        return int(ends[int(whole)]) + rest

    stops = [place(epoch) for epoch in range(epochs + 1)]
    return np.split(np.concatenate(passes), stops)[1:-1]


def make_order(streams: Sequence[Stream], parts: Sequence[str], epochs: int, seed: int, most: int | None) -> pa.Table:
    """The order of the plan's batches as batch_reader.SCHEMA, at most `most` steps. parts: part names, indexed by the streams."""
    chosen = [epochs_of(stream, epochs, seed) for stream in streams]
    rows = [np.zeros((0, 3), np.int32)]  # part, group, stream
    for epoch in range(epochs):
        of_epoch = [np.insert(each[epoch], 2, number, axis=1) for number, each in enumerate(chosen)]
        batches = np.concatenate([rows[0], *of_epoch])
        rows.append(batches[generator(seed, "epoch", epoch).permutation(len(batches))])
    part, group, stream = np.concatenate(rows)[:most].T
    names = pa.array([each.dataset for each in streams], pa.string())
    data = [
        np.arange(len(part)),
        pa.array(parts, pa.string()).take(pa.array(part)),
        group,
        names.take(pa.array(stream)),
    ]
    return pa.table([pa.array(column) for column in data], SCHEMA)

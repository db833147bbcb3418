"""The files that one stage wrote, as the input of the next one."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from ..data.shards import PLAN_SCHEMA
from ..storage.folder import Folder
from .parts import Part


@dataclass(frozen=True)
class StageFile:
    """An object that a stage wrote, with its number of rows."""

    path: str
    rows: int
    bytes: int


def files_of(folder: Folder, parts: Sequence[Part]) -> list[StageFile]:
    return [StageFile(folder.path(part.part), part.rows, part.bytes) for part in parts]


def grouped(files: Sequence[StageFile], count: int) -> list[Sequence[StageFile]]:
    """Neighbouring files in groups of `count`; the last group may have fewer."""
    return [files[start : start + count] for start in range(0, len(files), count)]


def files_plan(groups: Sequence[Sequence[StageFile]]) -> pa.Table:
    """A plan with a shard for each group of files, in order. The files have no tag: one that is published again is the same file."""
    rows = [
        {
            "shard": number,
            "path": file.path,
            "name": file.path.rpartition("/")[2],
            "start": 0,
            "stop": file.rows,
            "rows": file.rows,
            "size": file.bytes,
            "tag": "",
        }
        for number, group in enumerate(groups)
        for file in group
    ]
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)

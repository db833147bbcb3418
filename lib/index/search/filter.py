"""The only passages that a search may find: their ids are read once, held against the index, and kept for the workers."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.corpus import CorpusOptions, list_files, measure
from ...data.reader import read_rows
from ...data.shards import cut_shards, shards
from ...engine.parts import Part, parquet_bytes, read_manifest
from ...errors import InputError
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ...storage.listing import InputFile
from ..build.layout import ROWS
from ..build.stage_parts import ids_of
from .query import Opened, SearchConfig

log = logging.getLogger("shoal")

ALLOWED = "allowed.parquet"
IDS_AT_ONCE = 1_000_000  # of the list, and of the index: each time the whole list is hashed
COUNTED = 20_000_000  # rows of an index, up to which all its ids are read for that: some seconds from a local disk
THREADS = 4


@dataclass(frozen=True)
class AllowedIds:
    """name: of the list in the folder of the search; None where everything may be found. notes: for the report."""

    name: str | None = None
    notes: tuple[str, ...] = ()


def read_allowed_ids(config: SearchConfig, opened: Opened, folder: Folder) -> AllowedIds:
    """The list that --allow names, written once. Raises InputError for one without any id, or with none of the index's.

    Reads every id of an index of up to COUNTED rows. Memory: the list, once a thread, and the ids of a few million rows.
    """
    if config.allow is None:
        return AllowedIds()
    files = list_files(CorpusOptions(input=config.allow), folder.options)
    ids = _read(config, files, folder.options)
    if not len(ids):
        raise InputError(f"--allow {config.allow} has no id in column {config.allow_column!r}: nothing could be found")
    said = _compared(ids, config, opened)
    log.info(said)
    name = f"_{fingerprint(config.allow_column, [(f.name, f.size, f.tag) for f in files])}-{ALLOWED}"
    folder.claim(name, parquet_bytes(pa.table({"id": ids})))
    return AllowedIds(name, (said,))


def _compared(ids: pa.Array, config: SearchConfig, opened: Opened) -> str:
    """How many of the ids the index has, in a sentence. Raises InputError where it has none."""
    if opened.card["rows"] > COUNTED:
        return f"{len(ids):,} ids of --allow; how many of them are in an index of {opened.card['rows']:,} rows is not counted"
    if there := _there(ids, opened.folder.below(ROWS)):
        return f"{there:,} of the {len(ids):,} ids of --allow are in the index"
    raise InputError(
        f"none of the {len(ids):,} ids of --allow {config.allow} is in the index at {opened.folder.url}, {ids[0].as_py()!r} "
        "the first: nothing could be found. Give ids that rows/ of the index has, or name their --allow-column"
    )


def _read(config: SearchConfig, files: Sequence[InputFile], storage: Mapping[str, Any]) -> pa.Array:
    """The different ids of the list, large_string."""
    column = config.allow_column
    corpus = measure(files, CorpusOptions(input=str(config.allow), text_column=column), storage, strict=True)
    tables = [read_rows(shard, [column], corpus.schema, storage) for shard in shards(cut_shards(corpus, IDS_AT_ONCE))]
    found = [pc.unique(table[column].cast(pa.large_string())).drop_null() for table in tables]
    return pc.unique(pa.concat_arrays([*found, pa.array([], pa.large_string())]))


def _there(ids: pa.Array, rows: Folder) -> int:
    """How many of the ids, all different, the encoded rows have."""

    def places(parts: Sequence[Part]) -> pa.Array:
        return pc.index_in(ids_of(rows, parts), value_set=ids).drop_null()

    with ThreadPoolExecutor(THREADS) as threads:
        found = np.zeros(len(ids), bool)
        for each in threads.map(places, _groups(read_manifest(rows))):
            found[each.to_numpy()] = True
    return int(found.sum())


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in runs of about as many rows as are looked up at once."""
    ends = np.cumsum([part.rows for part in parts]) // IDS_AT_ONCE
    return [
        [part for part, _ in group] for _, group in groupby(zip(parts, ends, strict=True), key=lambda each: each[1])
    ]

"""The passages that a search may return: their ids are read once, compared with the index, and stored for the workers."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ..build.stage_parts import group_neighbours, ids_of
from .config import FilterOptions, SearchConfig
from .opened_index import OpenedIndex

log = logging.getLogger("shoal")

ALLOWED = "allowed.parquet"
IDS_AT_ONCE = 1_000_000  # of the list, and of the index: each look-up hashes the whole list
COUNTED_ROWS = 20_000_000  # largest index whose ids are read to count the allowed ones: some seconds from a local disk
THREADS = 4


def read_allowed_ids(config: SearchConfig, index: OpenedIndex, folder: Folder) -> tuple[str | None, tuple[str, ...]]:
    """Write the ids of --allow into the folder, once. Raises InputError where there is no id, or none that the index has.

    Returns the name of their file, None where all passages are allowed; and notes for the report. Reads every id of an index of up
    to COUNTED_ROWS rows. Memory: the list, once a thread, and the ids of a few million rows.
    """
    options = config.filter
    if options.allow is None:
        return None, ()
    files = list_files(CorpusOptions(input=options.allow), folder.options)
    ids = _read(options, files, folder.options)
    if not len(ids):
        raise InputError(f"--allow {options.allow} has no id in column {options.allow_column!r}: nothing can be found")
    note = _compare(ids, options, index)
    log.info(note)
    name = f"_{fingerprint(options.allow_column, [(f.name, f.size, f.tag) for f in files])}-{ALLOWED}"
    folder.claim(name, parquet_bytes(pa.table({"id": ids})))
    return name, (note,)


def _compare(ids: pa.Array, options: FilterOptions, index: OpenedIndex) -> str:
    """Count the ids that the index has, in a sentence. Raises InputError where it has none."""
    if index.card["rows"] > COUNTED_ROWS:
        return f"{len(ids):,} ids of --allow; how many of them are in an index of {index.card['rows']:,} rows is not counted"
    if known := _count_known(ids, index.folder.below(ROWS)):
        return f"{known:,} of the {len(ids):,} ids of --allow are in the index"
    raise InputError(
        f"none of the {len(ids):,} ids of --allow {options.allow} is in the index at {index.folder.url}, {ids[0].as_py()!r} "
        "the first: nothing could be found. Give ids that rows/ of the index has, or name their --allow-column"
    )


def _read(options: FilterOptions, files: Sequence[InputFile], storage: Mapping[str, Any]) -> pa.Array:
    """The different ids of the list, large_string."""
    column = options.allow_column
    corpus = measure(files, CorpusOptions(input=str(options.allow), text_column=column), storage, strict=True)
    tables = [read_rows(shard, [column], corpus.schema, storage) for shard in shards(cut_shards(corpus, IDS_AT_ONCE))]
    unique = [pc.unique(table[column].cast(pa.large_string())).drop_null() for table in tables]
    return pc.unique(pa.concat_arrays([*unique, pa.array([], pa.large_string())]))


def _count_known(ids: pa.Array, rows: Folder) -> int:
    """Count the ids, all different, that the encoded rows have."""

    def places(parts: Sequence[Part]) -> pa.Array:
        return pc.index_in(ids_of(rows, parts), value_set=ids).drop_null()

    parts = read_manifest(rows)
    groups = group_neighbours(parts, np.cumsum([part.rows for part in parts]) // IDS_AT_ONCE)
    with ThreadPoolExecutor(THREADS) as threads:
        known = np.zeros(len(ids), bool)
        for each in threads.map(places, groups):
            known[each.to_numpy()] = True
    return int(known.sum())

"""What a run's output folder says about it: the settings, the plan, the parts, the manifest.

    _run.json          settings and model of the run, created once; the same settings resume, others are refused
    _plan-N.parquet    the shards, created once; a grown corpus adds a plan, it never changes one
    part-N-KEY.parquet the rows of shard N, put in one step under a name that only the shard decides
    _quarantine.json   shards given up on, with the reason
    _manifest.parquet  part, rows, bytes, checksum: written last, and only when every part is there
    _holders/          who is at work: see lib/lease.py

A resumed run needs the plan and one listing of the folder: its memory grows with shards, never with rows.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.corpus import Corpus, CorpusOptions, list_files, measure, schema_from, schema_text
from ..data.shards import Shard, changed_files, count_shards, cut_shards, shards
from ..errors import InputError, RunError
from ..storage.folder import Folder
from .parts import FOOTER_THREADS, MANIFEST, RUN, Part, parquet_bytes, read_footer, read_manifest, write_manifest
from .run_config import check_same_settings, create_run_config, read_run_config

QUARANTINE, PLAN = "_quarantine.json", "_plan-{:04d}.parquet"


@dataclass(frozen=True)
class Run:
    """An opened run: where it writes, its plan (PLAN_SCHEMA), the input's columns, its record (_run.json)."""

    folder: Folder
    plan: pa.Table
    columns: pa.Schema
    record: dict[str, Any] = field(repr=False)

    @property
    def id_column(self) -> str | None:
        return self.record["id_column"]

    def shards(self, numbers: Sequence[int] | None = None) -> Iterator[Shard]:
        return shards(self.plan, numbers)

    def part_name(self, shard: Shard) -> str:
        key = hashlib.sha256((self.record["key"] + shard.key).encode()).hexdigest()[:12]
        return f"part-{shard.number:06d}-{key}.parquet"

    def part_names(self) -> dict[int, str]:
        return {shard.number: self.part_name(shard) for shard in self.shards()}


def open_ledger(
    folder: Folder,
    settings: Mapping[str, Any],
    options: CorpusOptions,
    storage: Mapping[str, Any],
    strict: bool,
    shard_rows: Callable[[Corpus], int],
    about: Mapping[str, Any],
) -> Run:
    """Start a run in `folder`, or take up the one that is there. `about` is noted in a new run and not compared.

    Raises RunError when the folder holds a run with other settings, InputError when a planned file has changed.
    """
    files = list_files(options, storage)
    record, corpus = read_run_config(folder), None
    if record is None:
        _refuse_stray_parts(folder)
        corpus = measure(files, options, storage, strict)
        if all(isinstance(measure, str) for measure in corpus.measures):
            raise InputError(f"no file at {options.input} can be read; the first: {corpus.measures[0]}")
        if not corpus.rows:
            raise InputError(f"{options.input} has no rows")
        found = {"columns": schema_text(corpus.schema), "id_column": corpus.id_column, "shard_rows": shard_rows(corpus)}
        record = create_run_config(folder, {"settings": settings, "about": about} | found)
    check_same_settings(folder, record["settings"], settings)
    tables = list(_plans(folder))
    planned = pa.concat_tables(tables) if tables else None
    if planned is not None and (complaints := changed_files(planned, files)):
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise InputError(
            f"the input is not what was planned: {'; '.join(complaints[:3])}{more}. "
            f"Restore it, or choose a new --output: {folder.url} holds rows of the old one"
        )
    if planned is None:
        corpus = corpus or measure(files, options, storage, strict)
        plan = _claim_plan(folder, 0, cut_shards(corpus, record["shard_rows"]))
    else:
        plan = _extend(folder, record, planned, len(tables), files, options, storage, strict)
    if plan.num_rows == 0:
        raise InputError(f"{options.input} has no rows")
    return Run(folder, plan, schema_from(record["columns"]), record)


def open_planned(
    folder: Folder,
    settings: Mapping[str, Any],
    plan: Callable[[], tuple[pa.Table, pa.Schema]],
    about: Mapping[str, Any],
) -> Run:
    """Start a run over a plan that is given, with the columns it reads, or take up the one that is there.

    plan: called while there is none; what fixes it belongs into the settings. Raises RunError for other settings.
    """
    record, made = read_run_config(folder), cache(plan)
    if record is not None:
        check_same_settings(folder, record["settings"], settings)
    else:
        _refuse_stray_parts(folder)
        found = {"columns": schema_text(made()[1]), "id_column": None, "shard_rows": 0}
        record = create_run_config(folder, {"settings": settings, "about": about} | found)
        check_same_settings(folder, record["settings"], settings)
    tables = list(_plans(folder)) or [_claim_plan(folder, 0, made()[0])]
    return Run(folder, pa.concat_tables(tables), schema_from(record["columns"]), record)


def read_plan(folder: Folder) -> tuple[pa.Table, pa.Schema]:
    """The plan of a run that has one, and the columns of its input."""
    record = read_run_config(folder)
    assert record is not None, folder.url
    return pa.concat_tables(_plans(folder)), schema_from(record["columns"])


def missing(ledger: Run) -> list[int]:
    """Shards without a part, by one listing of the folder."""
    there = ledger.folder.list("part-")
    return [number for number, name in ledger.part_names().items() if name not in there]


def audit(ledger: Run, known: Mapping[int, Part]) -> list[Part]:
    """List once more; when every part is there, write the manifest. `known`: parts this driver has receipts for.

    Raises RunError naming what is missing, or a part whose rows are not those planned.
    """
    there = ledger.folder.list()
    names = ledger.part_names()
    absent = [number for number, name in names.items() if name not in there]
    if absent:
        raise RunError(
            f"{len(absent)} of {len(names)} shards have no part: {absent[:10]}. Start the same command again"
        )
    known = {part.shard: part for part in read_manifest(ledger.folder)} | dict(known)
    sure = {n for n, part in known.items() if (part.part, part.bytes) == (names.get(n), there.get(part.part))}
    unknown = [number for number in names if number not in sure]
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        found = threads.map(lambda n: read_footer(ledger.folder, n, names[n], there[names[n]]), unknown)
        parts = known | dict(zip(unknown, found, strict=True))
    ordered = [parts[number] for number in names]
    _check_rows(ledger, ordered)
    write_manifest(ledger.folder, ordered)
    ledger.folder.sweep(done={*there, MANIFEST})
    return ordered


def write_quarantine(folder: Folder, reasons: Mapping[int, str], elsewhere: Container[int] = ()) -> None:
    """Reasons of shards that were given up on, beside those that other drivers wrote of shards missing elsewhere."""
    mine = {str(number): reason for number, reason in reasons.items()}
    there = _quarantine(folder)
    while there or mine:
        kept = {number: reason for number, reason in there.items() if int(number) in elsewhere}
        folder.publish(QUARANTINE, json.dumps(kept | mine, indent=1).encode())
        there = _quarantine(folder)  # another slice may have ended in the same moment
        if mine.items() <= there.items():
            return


def _quarantine(folder: Folder) -> dict[str, str]:
    return json.loads(folder.read(QUARANTINE)) if folder.exists(QUARANTINE) else {}


def _plans(folder: Folder) -> Iterator[pa.Table]:
    with suppress(FileNotFoundError):
        for number in count():
            yield pq.read_table(pa.BufferReader(folder.read(PLAN.format(number))))


def _claim_plan(folder: Folder, number: int, plan: pa.Table) -> pa.Table:
    """Create a plan unless another driver was first; what is stored is what counts."""
    name = PLAN.format(number)
    folder.claim(name, parquet_bytes(plan))
    return pq.read_table(pa.BufferReader(folder.read(name)))


def _refuse_stray_parts(folder: Folder) -> None:
    stray = folder.list("part-")
    if stray:
        raise RunError(
            f"{folder.url} holds {len(stray)} parts but no {RUN}: it is not a run of this job, or a damaged one. "
            "Choose an empty --output"
        )


def _extend(
    folder: Folder,
    record: Mapping[str, Any],
    planned: pa.Table,
    plans: int,
    files: Sequence[Any],
    options: CorpusOptions,
    storage: Mapping[str, Any],
    strict: bool,
) -> pa.Table:
    """Plan the files that no plan has yet. A limited run is closed: new files do not enter it."""
    known = set(planned["path"].unique().to_pylist())
    new = [file for file in files if file.path not in known and file.size]
    if options.limit or not new:
        return planned
    options = replace(options, id_column=record["id_column"])  # what names the old rows must name the new ones
    corpus = measure(new, options, storage, strict)
    added = cut_shards(corpus, record["shard_rows"], count_shards(planned))
    # Files without a row are looked at each time, and planned never.
    return pa.concat_tables([planned, _claim_plan(folder, plans, added)]) if added.num_rows else planned


def _check_rows(ledger: Run, parts: Sequence[Part]) -> None:
    """A shard of known length must have been read whole."""
    for shard, part in zip(ledger.shards(), parts, strict=True):
        if shard.rows not in (-1, part.source_rows):
            raise RunError(
                f"{part.part} is of {part.source_rows} rows, the plan of {shard.rows}. Delete it, start again"
            )

"""What a run's output folder says about it: the settings, the plan, the parts, the manifest.

    _run.json          settings and model of the run, created once; the same settings resume, others are refused
    _plan-N.parquet    the shards, created once; a grown corpus adds a plan, it never changes one
    part-N-KEY.parquet the rows of shard N, put in one step under a name that only the shard decides
    _quarantine.json   shards given up on, with the reason
    _manifest.parquet  part, rows, bytes, checksum: written last, and only when every part is there

A resumed run needs the plan and one listing of the folder: its memory grows with shards, never with rows.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from socket import gethostname
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .corpus import (
    Corpus,
    CorpusOptions,
    first_rows,
    list_files,
    measure_files,
    schema_from,
    schema_text,
)
from .errors import InputError, RunError, StorageError
from .plan import Shard, changed_files, count_shards, cut, shards
from .storage import Folder

RUN, MANIFEST, QUARANTINE, PLAN = "_run.json", "_manifest.parquet", "_quarantine.json", "_plan-{:04d}.parquet"
NUMBERS = ("rows", "errors", "truncated", "tokens")  # counted in every part and summed in the report
ROW_GROUP = 32_768  # rows; an index build reads row groups, 128 MiB of 1024 float32 dimensions
FOOTER_THREADS = 32
MANIFEST_SCHEMA = pa.schema(
    [("shard", pa.int64()), ("part", pa.string()), ("bytes", pa.int64()), ("data_bytes", pa.int64())]
    + [("sha256", pa.string())]
    + [(name, pa.int64()) for name in NUMBERS]
)


@dataclass(frozen=True)
class Part:
    """A published part. `sha256` is of the file's first `data_bytes` bytes, all before the Parquet footer."""

    shard: int
    part: str
    bytes: int
    data_bytes: int
    sha256: str
    rows: int
    errors: int
    truncated: int
    tokens: int


@dataclass(frozen=True)
class Ledger:
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
) -> Ledger:
    """Start a run in `folder`, or take up the one that is there. `about` is noted in a new run and not compared.

    Raises RunError when the folder holds a run with other settings, InputError when a planned file has changed.
    """
    files = list_files(options, storage)
    record, corpus = _read_record(folder), None
    if record is None:
        _refuse_stray_parts(folder)
        corpus = _measure(files, options, storage, strict)
        if all(isinstance(measure, str) for measure in corpus.measures):
            raise InputError(f"no file at {options.input} can be read; the first: {corpus.measures[0]}")
        if not corpus.rows:
            raise InputError(f"{options.input} has no rows")
        found = {"columns": schema_text(corpus.schema), "id_column": corpus.id_column, "shard_rows": shard_rows(corpus)}
        record = _claim_record(folder, {"settings": settings, "about": about} | found)
    _refuse_other_settings(folder, record["settings"], settings)
    tables = list(_plans(folder))
    planned = pa.concat_tables(tables) if tables else None
    if planned is not None and (complaints := changed_files(planned, files)):
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise InputError(
            f"the input is not what was planned: {'; '.join(complaints[:3])}{more}. "
            f"Restore it, or choose a new --output: {folder.url} holds rows of the old one"
        )
    if planned is None:
        corpus = corpus or _measure(files, options, storage, strict)
        plan = _claim_plan(folder, 0, cut(corpus, record["shard_rows"]))
    else:
        plan = _extend(folder, record, planned, len(tables), files, options, storage, strict)
    if plan.num_rows == 0:
        raise InputError(f"{options.input} has no rows")
    return Ledger(folder, plan, schema_from(record["columns"]), record)


def publish_part(folder: Folder, name: str, shard: int, table: pa.Table, numbers: Mapping[str, int]) -> Part:
    """Write `table` as one Parquet object in one step; numbers and checksum stand in its footer. Raises StorageError."""
    if folder.is_local and not folder.exists(RUN):
        raise StorageError(
            f"{folder.url} on the node {gethostname()} is not the folder of this run. Workers on several nodes need an "
            "--output on a shared file system, or in an object store"
        )
    sink = io.BytesIO()
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]  # noise to a compressor
    compression = {leaf: "NONE" if leaf.split(".")[0] in vectors else "ZSTD" for leaf in _leaves(table.schema)}
    words = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    with pq.ParquetWriter(sink, table.schema, compression=compression, use_dictionary=words) as writer:
        writer.write_table(table, row_group_size=ROW_GROUP)
        with sink.getbuffer() as data:  # every column chunk is there; what close adds is the footer
            data_bytes, digest = len(data), hashlib.sha256(data).hexdigest()
        seal = {**numbers, "data_bytes": data_bytes, "sha256": digest}
        writer.add_key_value_metadata({"shoal.part": json.dumps(seal)})
    with sink.getbuffer() as data:
        folder.publish(name, data)
        return Part(shard, name, len(data), data_bytes, digest, **{n: numbers.get(n, 0) for n in NUMBERS})


def read_manifest(folder: Folder) -> list[Part]:
    """The parts of the last audit that found every part; none before. A plan that has grown since has more shards."""
    try:
        table = pq.read_table(pa.BufferReader(folder.read(MANIFEST)))
    except FileNotFoundError:
        return []
    return [Part(**row) for row in table.to_pylist()]


def missing(ledger: Ledger) -> list[int]:
    """Shards without a part, by one listing of the folder."""
    there = ledger.folder.list("part-")
    return [number for number, name in ledger.part_names().items() if name not in there]


def audit(ledger: Ledger, known: Mapping[int, Part]) -> list[Part]:
    """List once more; when every part is there, write the manifest. `known`: parts this driver has receipts for.

    Raises RunError naming what is missing, or a part whose rows are not those planned.
    """
    there = ledger.folder.list("part-")
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
        found = threads.map(lambda n: _read_footer(ledger.folder, n, names[n], there[names[n]]), unknown)
        parts = known | dict(zip(unknown, found, strict=True))
    ordered = [parts[number] for number in names]
    _check_rows(ledger, ordered)
    ledger.folder.publish(MANIFEST, _parquet_bytes(pa.Table.from_pylist([vars(p) for p in ordered], MANIFEST_SCHEMA)))
    ledger.folder.sweep(done=there)
    return ordered


def write_quarantine(folder: Folder, reasons: Mapping[int, str]) -> None:
    if reasons or folder.exists(QUARANTINE):
        folder.publish(QUARANTINE, json.dumps({str(k): v for k, v in reasons.items()}, indent=1).encode())


def _measure(files: Sequence[Any], options: CorpusOptions, storage: Mapping[str, Any], strict: bool) -> Corpus:
    corpus = measure_files(files, options, storage, strict)
    return first_rows(corpus, options.limit, storage) if options.limit else corpus


def _read_record(folder: Folder) -> dict[str, Any] | None:
    try:
        return json.loads(folder.read(RUN))
    except FileNotFoundError:
        return None


def _plans(folder: Folder) -> Iterator[pa.Table]:
    with suppress(FileNotFoundError):
        for number in count():
            yield pq.read_table(pa.BufferReader(folder.read(PLAN.format(number))))


def _claim_plan(folder: Folder, number: int, plan: pa.Table) -> pa.Table:
    """Create a plan unless another driver was first; what is stored is what counts."""
    name = PLAN.format(number)
    folder.claim(name, _parquet_bytes(plan))
    return pq.read_table(pa.BufferReader(folder.read(name)))


def _refuse_stray_parts(folder: Folder) -> None:
    stray = folder.list("part-")
    if stray:
        raise RunError(
            f"{folder.url} holds {len(stray)} parts but no {RUN}: it is not a run of this job, or a damaged one. "
            "Choose an empty --output"
        )


def _claim_record(folder: Folder, record: dict[str, Any]) -> dict[str, Any]:
    """Create _run.json unless another driver was first; what is stored is what counts."""
    key = hashlib.sha256(json.dumps(record["settings"], sort_keys=True).encode()).hexdigest()[:16]
    folder.claim(RUN, json.dumps(record | {"key": key}, indent=1, sort_keys=True).encode())
    return json.loads(folder.read(RUN))


def _refuse_other_settings(folder: Folder, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    new = json.loads(json.dumps(new))
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if differing:
        said = "; ".join(f"{name}: there {old.get(name)!r}, asked {new.get(name)!r}" for name in differing)
        raise RunError(f"{folder.url} holds another run ({said}). Choose a new --output, or ask for the same")


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
    corpus = _measure(new, options, storage, strict)
    added = cut(corpus, record["shard_rows"], count_shards(planned))
    # Files without a row are looked at each time, and planned never.
    return pa.concat_tables([planned, _claim_plan(folder, plans, added)]) if added.num_rows else planned


def _read_footer(folder: Folder, shard: int, name: str, size: int) -> Part:
    with folder.open(name) as file, pq.ParquetFile(file) as parquet:
        seal = json.loads(parquet.metadata.metadata[b"shoal.part"])
        rows = parquet.metadata.num_rows
    if rows != seal["rows"]:
        raise RunError(f"{name} holds {rows} rows and says {seal['rows']}: it is damaged. Delete it and start again")
    return Part(shard, name, size, seal["data_bytes"], seal["sha256"], **{n: seal.get(n, 0) for n in NUMBERS})


def _check_rows(ledger: Ledger, parts: Sequence[Part]) -> None:
    """A shard of known length must have made a part from exactly that many input rows."""
    # Chunked runs make more rows than they read; there the count was held against the plan before publishing.
    if ledger.record["settings"].get("chunk_tokens"):
        return
    for shard, part in zip(ledger.shards(), parts, strict=True):
        if shard.rows not in (-1, part.rows):
            raise RunError(f"{part.part} has {part.rows} rows, the plan {shard.rows}. Delete it and start again")


def _leaves(schema: pa.Schema) -> list[str]:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    empty = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [empty.column(i).path for i in range(len(empty))]


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()

"""The output folder of a run: its config, plan, parts and manifest.

    _run.json          settings and model of the run, created once; the same settings resume, others are refused
    _plan-N.parquet    the shards, created once; a grown corpus adds a plan, it never changes one
    part-N-KEY.parquet the rows of shard N, put in one step under a name that only the shard decides
    _quarantine.json   shards given up on, with the reason
    _manifest.parquet  part, rows, bytes, checksum: written last, and only when every part is there
    _holders/          the drivers at work: see lease.py

A resumed run needs the plan and one listing of the folder: its memory grows with shards, never with rows.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.columns import schema_from
from ..data.shards import Shard, shards
from ..errors import RunError
from ..storage.fingerprint import fingerprint
from ..storage.folder import Folder
from .parts import FOOTER_THREADS, MANIFEST, RUN, Part, parquet_bytes, read_footer, read_manifest, write_manifest
from .planner import Planner

QUARANTINE, PLAN = "_quarantine.json", "_plan-{:04d}.parquet"
MAX_LETTERS = 200  # of a value in an error message


@dataclass(frozen=True)
class Run:
    """An opened run: its folder, its plan (PLAN_SCHEMA), the input's columns, its config (_run.json)."""

    folder: Folder
    plan: pa.Table
    columns: pa.Schema
    run_config: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, folder: Folder, settings: Mapping[str, Any], planner: Planner, about: Mapping[str, Any]) -> "Run":
        """Start a run in `folder`, or resume the one that is there. `about` is noted in a new run and not compared.

        Raises RunError when the folder holds a run with other settings, InputError when a planned file has changed.
        """
        run_config = read_run_config(folder)
        if run_config is None:
            if stray := folder.list("part-"):
                raise RunError(
                    f"{folder.url} holds {len(stray)} parts but no {RUN}: it is not a run of this job, or a damaged one. "
                    "Choose an empty --output"
                )
            run_config = create_run_config(folder, {"settings": settings, "about": about} | planner.describe())
        check_same_settings(folder, run_config["settings"], settings)
        plans = list(_plans(folder))
        if not plans:
            plans = [_create_plan(folder, 0, planner.plan(run_config))]
        elif (added := planner.extension(run_config, pa.concat_tables(plans))) is not None:
            plans.append(_create_plan(folder, len(plans), added))
        return cls(folder, pa.concat_tables(plans), schema_from(run_config["columns"]), run_config)

    @property
    def id_column(self) -> str | None:
        return self.run_config["id_column"]

    def shards(self, numbers: Sequence[int] | None = None) -> Iterator[Shard]:
        return shards(self.plan, numbers)

    def part_names(self, numbers: Sequence[int] | None = None) -> dict[int, str]:
        """Names of the parts of these shards, or of all. Only settings and shard decide them: late, doubled and retried writers
        overwrite each other.
        """
        key = self.run_config["key"]
        return {
            each.number: f"part-{each.number:06d}-{fingerprint(key, each.key)}.parquet" for each in self.shards(numbers)
        }


def read_run_config(folder: Folder) -> dict[str, Any] | None:
    """The run config of a folder; None where there is no run."""
    return folder.read_json(RUN)


def create_run_config(folder: Folder, run_config: dict[str, Any]) -> dict[str, Any]:
    """Create _run.json unless another driver was first; the stored one counts. `key` is added: it names the parts."""
    key = fingerprint(run_config["settings"], digits=16)
    folder.claim(RUN, json.dumps(run_config | {"key": key}, indent=1, sort_keys=True).encode())
    return folder.read_json(RUN)


def check_same_settings(folder: Folder, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raises RunError that spells out the difference, when the folder holds a run with other settings."""
    requested = json.loads(json.dumps(requested))
    differing = [name for name in sorted({*stored, *requested}) if stored.get(name) != requested.get(name)]
    if differing:
        values = [(name, _short(stored.get(name)), _short(requested.get(name))) for name in differing]
        difference = "; ".join(f"{name}: there {old}, asked {new}" for name, old, new in values)
        raise RunError(f"{folder.url} holds another run ({difference}). Choose a new --output, or ask for the same")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]}... ({len(text):,} letters)"


def read_plan(folder: Folder) -> tuple[pa.Table, pa.Schema]:
    """The plan of a run that has one, and the columns of its input."""
    run_config = read_run_config(folder)
    assert run_config is not None, folder.url
    return pa.concat_tables(_plans(folder)), schema_from(run_config["columns"])


def missing(run: Run) -> list[int]:
    """Shards without a part, by one listing of the folder."""
    published = run.folder.list("part-")
    return [number for number, name in run.part_names().items() if name not in published]


def audit(run: Run, known: Mapping[int, Part]) -> list[Part]:
    """List once more; when every part is there, with its rows, write the manifest. known: from receipts. Raises RunError."""
    sizes, names = run.folder.list(), run.part_names()
    if absent := [number for number, name in names.items() if name not in sizes]:
        raise RunError(
            f"{len(absent)} of {len(names)} shards have no part: {absent[:10]}. Start the same command again"
        )
    known = {part.shard: part for part in read_manifest(run.folder)} | dict(known)
    sure = {n for n, part in known.items() if (part.part, part.bytes) == (names.get(n), sizes.get(part.part))}
    unknown = [number for number in names if number not in sure]
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        footers = threads.map(lambda n: read_footer(run.folder, n, names[n], sizes[names[n]]), unknown)
        parts = known | dict(zip(unknown, footers, strict=True))
    ordered = [parts[number] for number in names]
    for shard, part in zip(run.shards(), ordered, strict=True):
        if shard.rows not in (-1, part.source_rows):
            raise RunError(
                f"{part.part} is of {part.source_rows} rows, the plan of {shard.rows}. Delete it, start again"
            )
    write_manifest(run.folder, ordered)
    run.folder.sweep(done={*sizes, MANIFEST})
    return ordered


def write_quarantine(folder: Folder, reasons: Mapping[int, str], elsewhere: Container[int] = ()) -> None:
    """Write the reasons of shards that were given up on, beside those that other drivers wrote of shards missing elsewhere."""
    own = {str(number): reason for number, reason in reasons.items()}
    stored = folder.read_json(QUARANTINE) or {}
    while stored or own:
        others = {number: reason for number, reason in stored.items() if int(number) in elsewhere}
        folder.publish(QUARANTINE, json.dumps(others | own, indent=1).encode())
        stored = folder.read_json(QUARANTINE) or {}  # another slice may have ended in the same moment
        if own.items() <= stored.items():
            return


def _plans(folder: Folder) -> Iterator[pa.Table]:
    with suppress(FileNotFoundError):
        for number in count():
            yield pq.read_table(pa.BufferReader(folder.read(PLAN.format(number))))


def _create_plan(folder: Folder, number: int, plan: pa.Table) -> pa.Table:
    """Create a plan unless another driver was first; what is stored is what counts."""
    name = PLAN.format(number)
    folder.claim(name, parquet_bytes(plan))
    return pq.read_table(pa.BufferReader(folder.read(name)))

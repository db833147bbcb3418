"""An index build under fire: driver and workers are killed in every stage, the same command again ends with the same index.

    python -m tests.chaos.index --kills 20 --where both

On the local disk, and with input and output on a real S3 server. Kills are spread over sample and training, encoding, segments
and merging. An undisturbed run, made first and elsewhere, says what must come of it; whatever is listed meanwhile is whole.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import click
import faiss
import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from faiss.contrib.inspect_tools import get_invlist

from tests.chaos import verify
from tests.chaos.chaos import guarded
from tests.chaos.cluster import Head
from tests.chaos.evaluation import Fire
from tests.chaos.observer import OPTIONS, S3_OPTIONS, Observer
from tests.chaos.tally import Tally
from tests.real.s3 import Ceph

DIM, FILES, CENTRES, LISTS = 64, 6, 200, 256
EACH, NULL, NAN = 97, 13, 50  # of every so many rows the 13th has no vector, the 50th one that is not finite; from 0
# The real job, with segments as small as their centroids allow; only the driver reads that number.
SCRIPT = "from lib.index.build import segments; segments.SEGMENT_BYTES = 1; from jobs.build_index import main; main()"
CLOCK = {"seconds", "core_ms", "versions"}  # in the card and in the manifest
# By how the first folder of each stage begins, in order: the share of the kills that have fallen when it ends.
SHARES = {"": 0.0, "sample": 0.15, "train": 0.33, "rows": 0.66, "segments": 0.83, "merge": 1.0, "queries": 1.0}
STAGES = list(SHARES)
PHASES = ("sample", "train"), ("rows",), ("segments",), ("merge",)  # in each of which a kill must have fallen
ENOUGH = 6  # kills, for one in each
MEANT = 0.9  # of a stage's parts are there when the last of its kills is meant to fall, at most
TICK = 0.03  # seconds
FLIGHTS = 0.0, 0.0, 0.2, 1.0  # seconds, at most, that a kill comes after its moment: at once, or later
EARLY_SHARE, EARLY = 0.2, (0.0, 10.0)  # of drivers are due so many seconds after their start, workers or not
WORKER_SHARE = 0.4  # of kills fall on a worker, the others on the driver
MOMENTS = 0.05, 0.6  # seconds between two listings of the index
PATIENCE = 600.0  # seconds for a driver that is left alone


class Output:
    """A build's folder as an outsider sees it, past every cache."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.path = fsspec.core.url_to_fs(url, **OPTIONS, **(S3_OPTIONS if "://" in url else {}))

    def names(self, folder: str = "") -> dict[str, str]:
        """What is listed directly in a folder of it, each with what changes when it is put again."""
        try:
            entries = self.fs.ls(f"{self.path}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        marks = ("ETag", "LastModified", "ino", "mtime")
        return {e["name"].rstrip("/").rsplit("/", 1)[-1]: str([e.get(mark) for mark in marks]) for e in entries}

    def files(self) -> dict[str, str]:
        """The files of faiss: the trained index, segments, merged indexes with their lists."""
        found = {at + name: tag for at in ("", "segments/", "merged/") for name, tag in self.names(at).items()}
        return {name: tag for name, tag in found.items() if name.endswith((".faiss", ".ivfdata"))}

    def digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(self.read(name)).hexdigest() for name in self.files()}

    def folders(self) -> dict[int, str]:
        """Of each stage that has begun, by its place in STAGES, its folder."""
        there = [*self.names(), *(f"_stages/{name}" for name in self.names("_stages"))]
        places = list(enumerate(STAGES))[1:]
        return {i: name for i, stage in places for name in there if name.removeprefix("_stages/").startswith(stage)}

    def parts(self, folder: str) -> int:
        return sum(name.startswith("part-") for name in self.names(folder))

    def reached(self) -> tuple[int, int]:
        """The place in STAGES of the last that has begun, and its parts."""
        folders = self.folders()
        place = max(folders, default=0)
        return place, self.parts(folders[place]) if place else 0

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.path}/{name}")

    def told(self, name: str) -> dict[str, Any]:
        """JSON without what a clock decides."""
        return json.loads(self.read(name), object_hook=lambda o: {key: o[key] for key in o.keys() - CLOCK})

    @contextmanager
    def opened(self, name: str, data: bytes) -> Iterator[Any]:
        """The faiss index of a file, as its user opens it; of a merged one, with the file of its lists beside it."""
        with tempfile.TemporaryDirectory(prefix="shoal-chaos-") as place:
            path, flags = Path(place, Path(name).name), 0
            path.write_bytes(data)
            if name.startswith("merged/"):
                path.with_suffix(".ivfdata").write_bytes(self.read(str(Path(name).with_suffix(".ivfdata"))))
                flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
            index = faiss.read_index(str(path), flags)
            lists = faiss.downcast_InvertedLists(faiss.extract_index_ivf(index).invlists)
            if flags and lists.totsize > path.with_suffix(".ivfdata").stat().st_size:  # a search would end this process
                raise RuntimeError("the file of its lists is cut")
            yield index

    def numbers(self, name: str) -> np.ndarray:
        """The rows that a file holds, list by list."""
        with self.opened(name, self.read(name)) as index:
            inner = faiss.extract_index_ivf(index)
            return np.concatenate([get_invlist(inner.invlists, place)[0] for place in range(inner.nlist)])


class Sights:
    """Sees to it that every file of faiss opens and answers whenever it is listed, and stays. Run `watch` in a thread."""

    def __init__(self, output: Output, tally: Tally, seed: int) -> None:
        self.output, self.tally, self.random = output, tally, random.Random(seed)
        self.tags: dict[str, str] = {}
        self.seen: set[tuple[str, str]] = set()  # names, each with the digest of what was there
        self.listings = 0

    def watch(self) -> None:
        while not self.tally.over.wait(self.random.uniform(*MOMENTS)):
            self.look()

    def look(self) -> None:
        files = self.output.files()
        self.listings += 1
        for name in self.tags.keys() - files.keys():
            self.tally.fail(f"{name} was listed and is not any more")
        for name, tag in files.items():
            if self.tags.get(name) != tag:
                self._open(name)
        self.tags = files

    def _open(self, name: str) -> None:
        try:
            data = self.output.read(name)
            self.seen.add((name, hashlib.sha256(data).hexdigest()))
            if name.endswith(".faiss"):
                with self.output.opened(name, data) as index:
                    index.search(np.zeros((1, DIM), np.float32), 1)
        except (FileNotFoundError, RuntimeError) as error:
            self.tally.fail(f"{name} is listed and does not open: {type(error).__name__}: {error}")


class StagedFire(Fire):
    """Kills the driver, which is started again, and workers, at work, when so many parts of a stage are there.

    totals: parts of each of STAGES in an undisturbed build. A kill for which a stage was over too soon falls in the next.
    """

    def __init__(self, *given: Any, totals: dict[int, int]) -> None:
        super().__init__(*given)
        ends = [math.ceil(self.wanted * share) for share in SHARES.values()]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.moments = [
            (place, int(share * totals.get(place, 0)))
            for place, count in enumerate(counts)
            for share in sorted(self.random.uniform(0, MEANT) for _ in range(count))
        ]

    def look(self) -> None:
        """Nothing: Sights does."""

    def _live(self, driver: subprocess.Popen) -> bool:
        began, first = time.monotonic(), self.output.reached()[0]
        last = first
        due = began + self.random.uniform(*EARLY) if self.random.random() < EARLY_SHARE else math.inf
        try:
            while driver.poll() is None and time.monotonic() < began + PATIENCE:
                time.sleep(TICK)
                reached, busy = self.output.reached(), [worker for worker in self.head.workers() if _at_work(worker)]
                if reached[0] != last:
                    last, due = reached[0], math.inf
                fallen = self.stages.total()
                if fallen == self.wanted or reached < self.moments[fallen]:
                    continue
                if due == math.inf and (busy or last > first):
                    due = time.monotonic() + (0 if last > first else self._flight())
                if time.monotonic() < due:
                    continue
                victim = self.random.choice(busy) if busy and self.random.random() < WORKER_SHARE else driver
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                    self._tell("driver" if victim is driver else "worker", reached)
                if victim is driver:
                    return True
                due = time.monotonic() + self._flight()
            return False
        finally:
            driver.kill()
            driver.wait()

    def _flight(self) -> float:
        return self.random.uniform(0, self.random.choice(FLIGHTS))

    def _tell(self, victim: str, reached: tuple[int, int]) -> None:
        place, parts = reached
        self.kills[victim] += 1
        self.stages[STAGES[place]] += 1
        click.echo(
            f"  start {self.lives}, kill {self.stages.total()} of {self.wanted}: {victim}, {STAGES[place]}, {parts} parts"
        )


def _at_work(worker: psutil.Process) -> bool:
    """Whether it does a shard now, and does not wait for the next stage."""
    with suppress(psutil.Error):
        return ".run" in " ".join(worker.cmdline())
    return False


def write_data(url: str, rows: int, seed: int) -> None:
    """Clustered vectors of many lengths with ids, in FILES Parquet files."""
    rng, place = np.random.default_rng(seed), np.arange(rows) % EACH
    vectors = rng.normal(size=(CENTRES, DIM))[rng.integers(CENTRES, size=rows)] + 0.4 * rng.normal(size=(rows, DIM))
    vectors[place == NAN, 0] = np.nan
    column = pa.FixedSizeListArray.from_arrays(np.float32(vectors).ravel(), DIM, mask=pa.array(place == NULL))
    table = pa.table({"id": [f"v-{row:08d}" for row in range(rows)], "embedding": column})
    system, path = verify.filesystem(url)
    system.create_dir(path)
    for number, start in enumerate(range(0, rows, size := -(-rows // FILES))):
        with system.open_output_stream(f"{path}/{number}.parquet") as sink:
            pq.write_table(table.slice(start, size), sink, row_group_size=1000)


def differences(calm: Output, fire: Output) -> list[str]:
    """How the index made under fire differs from the undisturbed one."""
    old, new = calm.digests(), fire.digests()
    problems = [f"other bytes: {name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in ("manifest.json", "card.json"):
        old, new = (each.told(name) for each in (calm, fire))
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        problems += [f"{name}, {key}: {new.get(key)}, undisturbed {old.get(key)}"[:400] for key in keys]
    old, new = (verify.read_folder(f"{each.url}/rows", "part-") for each in (calm, fire))
    return problems + [f"rows/, other {name}" for name in ("id", "list", "code", "error") if old[name] != new[name]]


def faults(inputs: str, output: Output) -> list[str]:
    """What of the input is missing or doubled, in rows/, in the segments and in the merged indexes."""
    wanted, rows = verify.read_folder(inputs)["id"].to_pylist(), verify.read_folder(f"{output.url}/rows", "part-")
    if (found := rows["id"].to_pylist()) != wanted:
        missing, more = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
        return [f"rows/: {missing.total()} missing, {more.total()} doubled or foreign; or in another order"]
    bad = np.isin(np.arange(len(wanted)) % EACH, (NULL, NAN))
    problems = [] if np.array_equal(rows["error"].is_valid(), bad) else ["rows/: reasons at other rows"]
    manifest, digests = output.told("manifest.json"), output.digests()
    named = {f"segments/{s['name']}": s["sha256"] for each in manifest["generations"] for s in each["segments"]}
    named |= {f"merged/{file['name']}": file["sha256"] for each in manifest["merged"] for file in each["files"]}
    if named | {"trained.faiss": digests.get("trained.faiss")} != digests:
        problems.append("the files are not those of the manifest")
    for kind in ("segments/", "merged/"):
        files = [name for name in digests if name.startswith(kind) and name.endswith(".faiss")]
        held = np.sort(np.concatenate([output.numbers(name) for name in files]))
        if not np.array_equal(held, np.flatnonzero(~bad)):
            problems.append(f"{kind}: {len(held)} entries, not one for each of {(~bad).sum()} rows with a vector")
    return problems


def one_store(place: str, logs: str, options: dict[str, Any]) -> list[str]:
    """The whole story on one store. Returns what is wrong."""
    rows, kills, seed, inputs = options["rows"], options["kills"], options["seed"], f"{place}/in"
    write_data(inputs, rows, seed)
    words = {"input": inputs, "kind": options["kind"], "lists": min(LISTS, rows // 50), "merge": 8}
    words |= {"shard-rows": options["shard_rows"], "recall-queries": 200}
    command = [sys.executable, "-c", SCRIPT, *(f"--{name}={value}" for name, value in words.items()), "--output"]
    calm, fire, tally = Output(f"{place}/calm"), Output(f"{place}/fire"), Tally(kills, ("driver", "worker"), rows)
    observer, sights = Observer(f"{fire.url}/rows", tally), Sights(Output(fire.url), tally, seed + 1)
    with Head() as head:
        quiet = StagedFire([*command, calm.url], head, calm, Path(f"{logs}-calm.log"), 0, seed, totals={})
        if said := quiet.burn():
            return [f"undisturbed: {said}"]
        click.echo(f"  undisturbed: {time.monotonic() - tally.began:.0f} s, {len(calm.files())} files of faiss")
        log, totals = Path(f"{logs}-fire.log"), {place: calm.parts(folder) for place, folder in calm.folders().items()}
        burning = StagedFire([*command, fire.url], head, fire, log, kills, seed, totals=totals)
        with guarded(tally, observer.watch, sights.watch):
            said = burning.burn()
    if said:
        return [said, *tally.problems]
    observer.look()
    sights.look()
    click.echo(f"  after {time.monotonic() - tally.began:.0f} s, {burning.lives} drivers, kills {burning.kills}")
    click.echo(f"  {dict(burning.stages)}; {sights.listings} listings, {len(sights.seen)} files opened")
    problems = [*tally.problems, *differences(calm, fire), *faults(inputs, fire)]
    problems += [f"once with other bytes: {name}" for name, _ in sights.seen - set(fire.digests().items())]
    problems += [f"left: {path}" for path in fire.fs.find(fire.path) if path.endswith(".unfinished")]
    missed = [phase for phase in PHASES if not any(burning.stages[stage] for stage in phase)]
    return problems + [f"no kill in {phase}" for phase in missed if kills >= ENOUGH]


@click.command()
@click.option("--kills", default=20, show_default=True, help="SIGKILLs on each store, of driver and workers together.")
@click.option("--where", type=click.Choice(["local", "s3", "both"]), default="both", show_default=True)
@click.option("--rows", default=150_000, show_default=True, help="Vectors.")
@click.option("--shard-rows", default=250, show_default=True, help="Fewer make the encoding longer.")
@click.option("--kind", default="ivf-rabitq", show_default=True, help="One that faiss can merge.")
@click.option("--seed", default=0, show_default=True, help="Of the vectors and of the moments of the kills.")
def main(where: str, **options: Any) -> None:
    """Build undisturbed, build under fire, compare; exit 1 with what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that server, head and driver are ended
    if where != "local" and (reason := Ceph.missing()):
        raise click.ClickException(reason)
    folder, problems = Path(tempfile.mkdtemp(prefix="shoal-chaos-")), []
    for store in ("local", "s3") if where == "both" else (where,):
        click.echo("{}: {rows:,} rows, shards of {shard_rows}, {kind}, {kills} kills".format(store, **options))
        with Ceph(folder / "ceph") if store == "s3" else nullcontext() as server:
            if server:
                os.environ.update(server.environment() | {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"})
                server.create_bucket("chaos")
            place = "s3://chaos" if server else str(folder / store)
            problems += [f"{store}: {problem}" for problem in one_store(place, f"{folder}/{store}", options)]
    if problems:
        raise click.ClickException("\n  ".join([f"{len(problems)} problems; logs are in {folder}", *problems]))
    shutil.rmtree(folder)
    click.echo("the same index, every row once, and nothing half-written seen")


if __name__ == "__main__":
    main()

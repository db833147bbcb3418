"""Exactly once, under fire: SIGKILL for driver, workers and store, the same command again, and then every row counted.

    python -m tests.chaos.chaos --store both --rows 100000 --kills 30

The job is the real command on a standing Ray head. Kills fall at random, but also at once when the parts are ahead of
the kills, so that each kind has had its number before the job can end. Then it ends undisturbed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

from tests.chaos import embed, rerank, verify
from tests.chaos.cluster import ROOT, Head, environment
from tests.chaos.driver import Driver
from tests.chaos.killers import ServerKiller, WorkerKiller
from tests.chaos.observer import Observer
from tests.chaos.tally import SERVERS, STEPS, Tally
from tests.real.s3 import Ceph, Server

JOBS = {"embed": embed, "rerank": rerank}
FILES = 8
WORDS = (5, 60)  # a text; long enough to keep shards in flight for some seconds between two kills
ROW_GROUP = 900  # rows; shards end within groups, and some lie in two files
LINE_SECONDS = 10.0
SECOND_PATIENCE = 120.0  # seconds


def write_input(job: ModuleType, url: str, rows: int, seed: int) -> None:
    """Ids and the columns of the job in FILES Parquet files; texts are short, of many lengths, some alike, some null or blank."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    system, path = verify.filesystem(url)
    system.create_dir(path)
    for number, start in enumerate(range(0, rows, size := -(-rows // FILES))):
        ids = [f"doc-{row:08d}" for row in range(start, min(start + size, rows))]
        texts = [_text(rng, vocabulary) for _ in ids]
        with system.open_output_stream(f"{path}/{number}.parquet") as sink:
            data = {name: pa.array(column, pa.string()) for name, column in job.columns(texts, rng).items()}
            pq.write_table(pa.table({"id": ids} | data), sink, row_group_size=ROW_GROUP)


def _text(rng: random.Random, vocabulary: list[str]) -> str | None:
    kind = rng.random()
    if kind < 0.03:
        return rng.choice([None, "", "  \n"])
    if kind < 0.06:
        return "one of many equal texts"
    return " ".join(rng.choices(vocabulary, k=rng.randint(*WORDS)))


@contextmanager
def guarded(tally: Tally, *works: Callable[[], None]) -> Iterator[list[threading.Thread]]:
    """A thread for each; one that raises ends the run and is told as a problem."""

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            tally.fail(f"the chaos test itself failed: {traceback.format_exc()}")
            tally.over.set()

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        tally.over.set()
        for thread in threads:
            thread.join(60)


def progress_lines(tally: Tally) -> None:
    while not tally.over.wait(LINE_SECONDS):
        kills = "  ".join(f"{kind} {n}/{tally.target}" for kind, n in tally.killed().items())
        rows = f"{tally.done:,} of {tally.rows:,} rows in {tally.parts} parts"
        click.echo(f"{time.monotonic() - tally.began:5.0f} s  {rows}  kills: {kills}  starts {tally.starts}")


def run_once(command: list[str], env: dict[str, str]) -> tuple[int, float, str]:
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECOND_PATIENCE)
    return done.returncode, time.monotonic() - began, done.stderr + done.stdout


def under_fire(driver: Driver, observer: Observer, head: Head, server: Server | None, seed: int) -> None:
    """Kill and restart until the driver has ended well or something is wrong."""
    tally = driver.tally
    workers = WorkerKiller(head, tally, seed + 1)
    works = (driver.supervise, observer.watch, workers.kill_on, lambda: progress_lines(tally))
    killer = ServerKiller(server, tally, seed + 2) if server else None
    try:
        with guarded(tally, *works) as (driving, *_):
            while driving.is_alive():
                if killer and tally.wanted("server") and not tally.over.is_set():
                    killer.step()
                driving.join(0.2)
    finally:
        driver.end()


def one_store(
    job: ModuleType, place: str, folder: Path, model: str, server: Server | None, options: dict[str, Any]
) -> list[str]:
    """The whole story on one store. Returns what is wrong."""
    rows, seed = options["rows"], options["seed"]
    inputs, output = f"{place}/in", f"{place}/out"
    write_input(job, inputs, rows, seed)
    kinds = ("driver", "worker", "server") if server else ("driver", "worker")
    with Head() as head:
        tally = Tally(options["kills"], kinds, rows)
        observer = Observer(output, tally)
        logs = folder / "logs"
        logs.mkdir()
        command = [sys.executable, job.SCRIPT, "--input", inputs, "--output", output, "--model", model]
        command += ["--shard-rows", str(options["shard_rows"]), "--dtype", "float32"]
        env = environment() | {"RAY_ADDRESS": head.address}
        driver = Driver(command, env, head, tally, logs, seed)
        under_fire(driver, observer, head, server, seed)
        counts: dict[str, Any] = {"seconds": round(time.monotonic() - tally.began)}
        if not tally.problems:
            counts |= settle(driver, observer, verify.verify(job, inputs, output, model, seed))
    show(counts | summary(tally, observer), tally)
    return tally.problems


def settle(driver: Driver, observer: Observer, verified: tuple[dict[str, Any], list[str]]) -> dict[str, Any]:
    """The last look, the count of every row, and the second identical command, which must change nothing."""
    tally = driver.tally
    if not observer.look():
        tally.fail("the output cannot be listed at the end")
    if observer.unfinished:
        tally.fail(f"{observer.unfinished} unfinished files are left in the output")
    counts, problems = verified
    tags = dict(observer.tags)
    code, seconds, words = run_once(driver.command, driver.env)
    observer.look()
    problems += [f"the second identical command exits {code}: {words[-1000:]}"] if code else []
    problems += ["the second identical command rewrote parts"] if observer.tags != tags else []
    problems += [f"the second identical command had something to do: {words}"] if "nothing to do" not in words else []
    for problem in problems:
        tally.fail(problem)
    return counts | {"second command": f"exit {code} in {seconds:.1f} s"}


def summary(tally: Tally, observer: Observer) -> dict[str, Any]:
    kills = tally.kills
    return {
        "kills of the driver": kills["driver"],
        "kills of workers": f"{sum(kills[n] for n in STEPS)} ({', '.join(f'{n} {kills[n]}' for n in STEPS)})",
        "kills of the server": f"{sum(kills[n] for n in SERVERS)} ({', '.join(f'{n} {kills[n]}' for n in SERVERS)})",
        "driver starts": f"{tally.starts}; {tally.barren} killed before they published, {tally.slow} of them slow",
        "worker outlives driver": f"{tally.orphan_seconds:.1f} s at most",
        "parts seen rewritten": observer.rewritten,
        "listings checked": f"{observer.listings}, {observer.unanswered} more unanswered",
        "partial objects seen": observer.partial,
        "tracebacks of drivers": len(tally.tracebacks),
    }


def show(counts: dict[str, Any], tally: Tally) -> None:
    for name, value in counts.items():
        click.echo(f"  {name:<24} {value:,}" if isinstance(value, int) else f"  {name:<24} {value}")
    click.echo("  exits of drivers that nobody killed:")
    for code, number in sorted(tally.exits.items()):
        click.echo(f"    exit {code}: {number}")
        for line, times in tally.last_lines[code].most_common(5 if code else 0):
            click.echo(f"      {times} x {line}")
    for text in tally.tracebacks[:5]:
        click.echo(text)
    for problem in tally.problems:
        click.echo(f"  WRONG: {problem}")


def run_store(job: ModuleType, store: str, model: str, folder: Path, options: dict[str, Any]) -> list[str]:
    click.echo(
        "{} on {}: {rows:,} rows, shards of {shard_rows}, {kills} kills of each kind".format(
            job.SCRIPT, store, **options
        )
    )
    folder.mkdir()
    server = Ceph(folder / "ceph") if store == "ceph" else None
    with server or nullcontext():
        place = str(folder)
        if server:
            os.environ.update(server.environment() | {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"})
            server.create_bucket("chaos")
            place = "s3://chaos"
        return one_store(job, place, folder, model, server, options)


@click.command()
@click.option("--job", "name", type=click.Choice(list(JOBS)), default="embed", show_default=True)
@click.option("--store", type=click.Choice(["local", "ceph", "both"]), default="both", show_default=True)
@click.option("--rows", default=100_000, show_default=True, help="Rows of the corpus.")
@click.option("--kills", default=30, show_default=True, help="SIGKILLs of each kind: driver, workers, server.")
@click.option("--shard-rows", default=250, show_default=True, help="Fewer make a longer run.")
@click.option("--seed", default=0, show_default=True, help="Of the corpus and of the moments of the kills.")
def main(name: str, store: str, **options: Any) -> None:
    """Run the chaos test and print its counts; exit 1 with what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers, head and driver are ended
    stores = ["local", "ceph"] if store == "both" else [store]
    if "ceph" in stores and (reason := Ceph.missing()):
        raise click.ClickException(reason)
    folder = Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    job = JOBS[name]
    model = job.model(folder / "model")
    problems = [f"{place}: {p}" for place in stores for p in run_store(job, place, model, folder / place, options)]
    if problems:
        click.echo(f"FAILED: {len(problems)} problems; logs are kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)
    click.echo("every row once, in whole parts only")


if __name__ == "__main__":
    main()

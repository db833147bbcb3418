"""A head that dies again and again, with the driver on it and every worker: the resubmit loop finishes the job all the same.

    python -m tests.chaos.heads --minutes 20

jobs/submit_job.py runs beside the cluster, as on a laptop or a small machine that is not spot. Every 60 to 120 seconds the whole
cluster is killed by SIGKILL, or, every third time, the driver alone; the head comes back empty on the same ports, as a pod or a
machine of `ray up` would. After `--minutes` the killing ends, and every row is counted.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import click
import psutil

from tests.chaos import embed, verify
from tests.chaos.chaos import write_input
from tests.chaos.cluster import ROOT, environment
from tests.real.head import Head
from tests.real.s3 import Ceph

PAUSE = (60.0, 120.0)  # seconds between two kills
AWAY = (2.0, 10.0)  # seconds until the head is started again
PATIENCE = 1200.0  # seconds for the rest, once nobody kills any more
DRIVER_ALONE = 3  # every third kill
SHARD_ROWS = 250


def loop(head: Head, place: str, model: str, variables: dict[str, str], log: Path) -> subprocess.Popen:
    """jobs/submit_job.py with the embed job."""
    line = [sys.executable, "jobs/submit_job.py", "--address", f"http://127.0.0.1:{head.dashboard}"]
    line += [word for pair in variables.items() for word in ("--env", "=".join(pair))]
    line += ["--", "python", "jobs/embed_corpus.py", "--input", f"{place}/in", "--output", f"{place}/out"]
    line += ["--model", model, "--shard-rows", str(SHARD_ROWS), "--dtype", "float32"]
    out = log.open("wb")
    return subprocess.Popen(line, cwd=ROOT, env=head.environment | {"PYTHONPATH": str(ROOT)}, stdout=out, stderr=out)


def drivers(head: Head) -> list[psutil.Process]:
    """The job's own processes on the head."""
    found = psutil.Process(head.process.pid).children(recursive=True)
    return [each for each in found if "jobs/embed_corpus.py" in " ".join(_words(each)[1:2])]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def parts(place: str) -> int:
    system, path = verify.filesystem(f"{place}/out")
    selector = verify.fs.FileSelector(path, allow_not_found=True)
    return sum(info.base_name.startswith("part-") for info in system.get_file_info(selector))


def kill_for(minutes: float, head: Head, job: subprocess.Popen, place: str, rng: random.Random) -> Counter[str]:
    """Kill until the time is over or the job has ended; how often of each kind."""
    until, kills = time.monotonic() + 60 * minutes, Counter[str]()
    while time.monotonic() < until and job.poll() is None:
        time.sleep(rng.uniform(*PAUSE))
        number = kills.total() + 1
        if number % DRIVER_ALONE == 0 and (running := drivers(head)):
            for each in running:
                each.kill()
            kills["driver"] += 1
            click.echo(f"{minutes * 60 - until + time.monotonic():5.0f} s  driver killed at {parts(place)} parts")
            continue
        head.__exit__()
        kills["head" if number % DRIVER_ALONE else "head, no driver was there"] += 1
        click.echo(f"{minutes * 60 - until + time.monotonic():5.0f} s  head killed at {parts(place)} parts")
        time.sleep(rng.uniform(*AWAY))
        head.__enter__()
    return kills


@click.command()
@click.option("--minutes", default=20.0, show_default=True, help="Of killing.")
@click.option("--rows", default=800_000, show_default=True, help="Of the corpus.")
@click.option("--seed", default=0, show_default=True)
def main(minutes: float, rows: int, seed: int) -> None:
    """Kill the head and the driver, and print what came of it; exit 1 with what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if reason := Ceph.missing():
        raise click.ClickException(reason)
    folder, rng = Path(tempfile.mkdtemp(prefix="shoal-heads-")), random.Random(seed)
    model = embed.model(folder / "model")
    with Ceph(folder / "ceph") as server, Head(folder) as head:
        variables = server.environment() | {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
        os.environ.update(variables | environment())
        server.create_bucket("heads")
        place, log = "s3://heads", folder / "loop.log"
        write_input(SimpleNamespace(columns=embed.columns), f"{place}/in", rows, seed)
        began = time.monotonic()
        job = loop(head, place, model, variables, log)
        try:
            kills = kill_for(minutes, head, job, place, rng)
            early = job.poll() is not None
            code = job.wait(PATIENCE)
        finally:
            job.kill()
        took = time.monotonic() - began
        counts, problems = verify.verify(embed, f"{place}/in", f"{place}/out", model, seed) if code == 0 else ({}, [])
    problems += [f"the loop ended with {code}"] if code else []
    problems += ["the job was done before the killing was"] if early else []
    tries = log.read_text().count("submitted shoal-")
    told = counts | {"kills": dict(kills), "tries": tries, "seconds": round(took)}
    click.echo("\n".join(f"  {name:<20} {value}" for name, value in told.items()))
    if problems:
        click.echo(f"FAILED: {'; '.join(problems)}; the log is {log}")
        sys.exit(1)
    shutil.rmtree(folder)
    click.echo("every row once")


if __name__ == "__main__":
    main()

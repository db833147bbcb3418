"""Jobs across three hosts, each with a network of its own, data on an S3 server at a fourth address; and what befalls them.

    python -m tests.chaos.hosts                      every fault below in a run of its own, of the embed job
    python -m tests.chaos.hosts --only a,f
    python -m tests.chaos.hosts --finetune           a training on two hosts, of which one is lost: 0, a and c

After each: every row once, no object that was ever half there; a training's losses within 1e-5 of the undisturbed run's.
"recovery" is the longest time without a new part (of a training: checkpoint) between the fault and the last one, the fault's
own seconds counted; "gap before" is the same before the fault, "end" the time from the last part to the end of the job.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np

from lib.storage.folder import Folder
from tests.chaos import embed, finetune, verify
from tests.chaos.chaos import guarded, write_input
from tests.chaos.observer import Observer
from tests.chaos.tally import Tally
from tests.real.hosts import DASHBOARD, Host, Hosts, missing
from tests.real.proxy import FaultProxy
from tests.real.s3 import Ceph, Server
from tests.support.tiny import build

SHARD_ROWS = 100
FAULT_AT = 0.25  # of the parts, or checkpoints
LOOK_SECONDS = 0.3
PATIENCE = 900.0  # seconds for one job
CUT_SECONDS, DOWN_SECONDS = 20.0, 30.0
SLOW, ERRORS = 200_000, 0.05  # bytes a second and connection; share of requests, for 503 and for resets
STEPS, CHECKPOINT_STEPS = 80, 4
DONE_BY_HOST = """
import collections, json
from ray.util.state import list_nodes, list_tasks
hosts = {node.node_id: node.node_ip for node in list_nodes(limit=1000)}
wanted = [("name", "=", "MapWorker(MapBatches(Compute)).submit"), ("state", "=", "FINISHED")]
done = list_tasks(filters=wanted, limit=10_000, raise_on_missing_output=False)
print(json.dumps(collections.Counter(hosts.get(task.node_id, "?") for task in done)))
"""


@dataclass
class Place:
    """Hosts with a cluster on them, and the proxy through which they see S3."""

    hosts: Hosts
    proxy: FaultProxy
    folder: Path


def nothing(place: Place) -> None:
    pass


def cut_off(place: Place) -> None:
    place.hosts.workers[0].cut()


def cut_and_back(place: Place) -> None:
    place.hosts.workers[0].cut()
    time.sleep(CUT_SECONDS)
    place.hosts.workers[0].restore()


def killed(place: Place) -> None:
    place.hosts.workers[0].kill()


def slow_store(place: Place) -> None:
    place.proxy.bytes_per_second, place.proxy.error_rate, place.proxy.reset_rate = SLOW, ERRORS, ERRORS


def store_down(place: Place) -> None:
    place.proxy.down = True
    time.sleep(DOWN_SECONDS)
    place.proxy.down = False


def head_killed(place: Place) -> None:
    place.hosts.head.kill()
    place.hosts.head.start()


FAULTS: dict[str, tuple[str, Callable[[Place], None]]] = {
    "0": ("undisturbed", nothing),
    "a": ("a host cut off for good", cut_off),
    "b": (f"a host cut off for {CUT_SECONDS:.0f} s", cut_and_back),
    "c": ("a host killed", killed),
    "d": (f"S3 at {SLOW / 1000:.0f} kB/s, {ERRORS:.0%} 503 and {ERRORS:.0%} resets", slow_store),
    "e": (f"S3 down for {DOWN_SECONDS:.0f} s", store_down),
    "f": ("the head killed and started", head_killed),
}


class Timeline:
    """When what is counted grew. Run `watch` in a thread."""

    def __init__(self, count: Callable[[], int], over: threading.Event):
        self.count, self.over = count, over
        self.moments: list[float] = []
        self.last = 0

    def watch(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        if (now := self.count()) > self.last:
            self.last = now
            self.moments.append(time.monotonic())

    def longest(self, since: float, until: float) -> float:
        """Seconds without growth, between two moments that count as growth themselves."""
        inside = [since, *(moment for moment in self.moments if since < moment < until), until]
        return max(b - a for a, b in pairwise(inside))


@contextmanager
def place(count: int, folder: Path, server: Server) -> Iterator[Place]:
    with Hosts(count, folder) as hosts, FaultProxy("127.0.0.1", server.ports["s3"], hosts.gateway) as proxy:
        hosts.start_ray(server.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint})
        yield Place(hosts, proxy, folder)


def at_work(host: Host) -> bool:
    """Whether a worker of the job runs on the host: the embed job's with its model loaded, or a training's."""
    titles = host.titles()
    loaded = any("MapBatches(Compute)" in title and "__init__" not in title for title in titles)
    return loaded or any("RayTrainWorker" in title for title in titles)


def job(place: Place, letter: str, words: list[str], timeline: Timeline, total: int) -> dict[str, Any]:
    """Run a command on the head; the fault when its share of `total` is there and each host is at work; what was seen."""
    log = (place.folder / "driver.log").open("ab")
    if letter == "f":
        submit = [sys.executable, "jobs/submit_job.py", "--address", DASHBOARD, "--", "python", *words]
        driver = place.hosts.head.run_near(*submit, stdout=log, stderr=log)
    else:
        driver = place.hosts.head.run("python", *words, stdout=log, stderr=log)
    began = time.monotonic()
    while driver.poll() is None and not (timeline.last >= FAULT_AT * total and all(map(at_work, place.hosts.all))):
        time.sleep(0.1)
    fault = time.monotonic()
    early = driver.poll() is not None
    if not early:
        FAULTS[letter][1](place)
    code = driver.wait(PATIENCE)
    ended = time.monotonic()
    timeline.look()
    first, last = timeline.moments[0], timeline.moments[-1]
    return {
        "exit": "before the fault" if early else code,
        "seconds": ended - began,
        "gap before": timeline.longest(first, fault),
        "recovery": timeline.longest(fault, last),
        "end": max(0.0, ended - last),
    }


def embed_once(
    letter: str, bucket: str, rows: int, model: str, folder: Path, server: Server
) -> tuple[dict[str, Any], list[str]]:
    """One run of the embed job with one fault. What was seen, and what is wrong."""
    inputs, output = f"{bucket}/in", f"{bucket}/out-{letter}"
    words = [embed.SCRIPT, "--input", inputs, "--output", output, "--model", model, "--dtype", "float32"]
    words += ["--shard-rows", str(SHARD_ROWS), "--cpus-per-worker", "2", "--max-workers", "3"]
    tally = Tally(0, (), rows)
    observer = Observer(output, tally)

    def parts() -> int:
        observer.look()
        return tally.parts

    timeline = Timeline(parts, tally.over)
    with place(3, folder, server) as there, guarded(tally, timeline.watch):
        seen = job(there, letter, words, timeline, rows // SHARD_ROWS)
        seen["shards"] = done_by_host(there)
        seen["requests"] = f"{there.proxy.requests}, {there.proxy.errors} x 503, {there.proxy.resets} reset"
    if seen["exit"]:
        return seen, [f"exit {seen['exit']}, see {folder}/driver.log"]
    if letter == "d" and not (there.proxy.errors and there.proxy.resets):
        tally.fail("no request met an error")
    idle = [host.name for host in there.hosts.all if host.name not in seen["shards"]]
    if letter == "0" and idle:
        tally.fail(f"{', '.join(idle)} had no part in it")
    counts, problems = verify.verify(embed, inputs, output, model, seed=0)
    seen["rows"] = f"{counts['rows out']} of {counts['rows in']}"
    return seen, [*tally.problems, *problems]


def done_by_host(place: Place) -> dict[str, int]:
    """Shards that each host's model has done, as the head remembers; it forgets when it is killed."""
    names = {host.address: host.name for host in place.hosts.all}
    with (place.folder / "done.log").open("wb") as log:
        asked = place.hosts.head.run("python", "-c", DONE_BY_HOST, stdout=-1, stderr=log)
        said, _ = asked.communicate(timeout=PATIENCE)
    return {names[address]: number for address, number in json.loads(said).items() if address in names}


def train_once(letter: str, model: str, folder: Path, server: Server) -> tuple[dict[str, Any], list[str]]:
    """One training on two hosts with one fault, held against the undisturbed one. What was seen, and what is wrong."""
    calm, output = Folder("s3://hosts/trained-0"), Folder(f"s3://hosts/trained-{letter}")
    words = ["jobs/finetune_model.py", "--data", "s3://hosts/pairs.jsonl", "--model", model, "--output", output.url]
    words += ["--batch", "8", "--group", "2", "--epochs", "1", "--max-steps", str(STEPS), "--learning-rate", "1e-3"]
    words += ["--checkpoint-steps", str(CHECKPOINT_STEPS), "--token-budget", "512"]
    words += ["--cpus-per-worker", "2", "--min-workers", "1", "--max-workers", "2"]
    tally = Tally(0, (), 0)
    timeline = Timeline(lambda: len(output.below("metrics").list("metrics-")), tally.over)
    with place(2, folder, server) as there, guarded(tally, timeline.watch):
        seen = job(there, letter, words, timeline, STEPS // CHECKPOINT_STEPS)
    if seen["exit"]:
        return seen, [f"exit {seen['exit']}, see {folder}/driver.log"]
    expected, found = finetune.losses(calm), finetune.losses(output)
    if len(expected) != STEPS or len(found) != STEPS:
        return seen, [f"{len(found)} steps, {len(expected)} undisturbed"]
    far = float(np.abs(expected - found).max())
    seen["rows"] = f"{STEPS} losses within {far:.1e}"
    return seen, [*tally.problems, *([f"losses differ by {far}"] if far > finetune.CLOSE else [])]


def show(table: dict[str, dict[str, Any]]) -> None:
    click.echo(f"{'':<38}{'exit':>5}{'seconds':>9}{'gap before':>12}{'recovery':>10}{'end':>6}  rows, shards, requests")
    for letter, seen in table.items():
        numbers = "{exit!s:>5}{seconds:>9.0f}{gap before:>12.1f}{recovery:>10.1f}{end:>6.1f}".format(**seen)
        shards = " ".join(f"{host} {number}" for host, number in sorted(seen.get("shards", {}).items()))
        words = "; ".join([seen.get("rows", ""), shards, seen.get("requests", "")])
        click.echo(f"{letter} {FAULTS[letter][0]:<36}{numbers}  {words}")


@click.command()
@click.option("--only", default="", help="Faults by commas, of 0,a,b,c,d,e,f. Default: all.")
@click.option("--finetune", "training", is_flag=True, help="A training on two hosts: 0, a and c.")
@click.option("--rows", default=30_000, show_default=True, help="Of the corpus; a minute's work.")
def main(only: str, training: bool, rows: int) -> None:
    """Run the faults one after the other and print what was seen; exit 1 with what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts and server are ended
    if reason := missing() or Ceph.missing():
        raise click.ClickException(reason)
    letters = only.split(",") if only else ["0", "a", "c"] if training else list(FAULTS)
    if training and "0" not in letters:
        letters = ["0", *letters]
    folder = Path(tempfile.mkdtemp(prefix="shoal-hosts-"))
    model = str(
        build("bert", folder / "model", positions=512, max_seq_length=512)
    )  # long texts give every host a share
    table, wrong = {}, []
    with Ceph(folder / "ceph") as server:
        os.environ.update(server.environment() | {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"})
        server.create_bucket("hosts")
        if training:
            finetune.write_data(folder / "pairs.jsonl")
            Folder("s3://hosts").publish("pairs.jsonl", (folder / "pairs.jsonl").read_bytes())
        else:
            write_input(embed, "s3://hosts/in", rows, seed=0)
        for letter in letters:
            click.echo(f"{letter}: {FAULTS[letter][0]}")
            of = (model, folder / letter, server)
            run = train_once(letter, *of) if training else embed_once(letter, "s3://hosts", rows, *of)
            table[letter], problems = run
            wrong += [f"{letter}: {problem}" for problem in problems]
            show({letter: table[letter]})
    show(table)
    if wrong:
        click.echo("\n".join([*wrong, f"FAILED; logs are in {folder}"]))
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

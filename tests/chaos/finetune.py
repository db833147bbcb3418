"""A training under fire: data, plan and checkpoints on a real S3 server, workers killed at random; the same run in the end.

    python -m tests.chaos.finetune --kills 10        SIGKILL of workers, and of the driver where --driver-kills says so
    python -m tests.chaos.finetune --lose-node       one of two nodes goes, with elastic workers

Killed workers: every loss and every weight equal the undisturbed run's, bit for bit. A lost node: every loss within 1e-5.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
import psutil

from lib.storage.folder import Folder
from lib.training.metrics import read_metrics
from tests.chaos.cluster import ROOT, Head, environment
from tests.real.s3 import Ceph
from tests.support.tiny import TEXT, build

STEPS, CHECKPOINT_STEPS = 400, 10
ROWS = 3000
PATIENCE = 1500.0  # seconds for one run
AFTER = 0.0, 1.5  # seconds after a checkpoint at which a kill falls
CLOSE = 1e-5  # of losses at another number of workers


def write_data(file: Path) -> None:
    """Pairs of random sentences with hard negatives; the query is a part of its positive."""
    rng = random.Random(0)
    words = [word for text in TEXT for word in text.split()]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, most)))

    with file.open("w") as lines:
        for _ in range(ROWS):
            positive = text(30)
            row = {"query": f"{positive[:40]} {text(6)}", "pos": [positive], "neg": [text(30) for _ in range(3)]}
            lines.write(json.dumps(row) + "\n")


def losses(output: Folder) -> np.ndarray:
    return read_metrics(output.below("metrics"))["loss"].to_numpy()


def weights(output: Folder) -> str:
    return hashlib.sha256(output.below("model").read("model.safetensors")).hexdigest()


def trainers(head: Head) -> list[psutil.Process]:
    """Processes of the training workers, wherever Ray put them."""
    found = []
    for process in head.family():
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


class Run:
    """One training, killed at random places while it has kills to go."""

    def __init__(self, words: list[str], output: Folder, head: Head, log: Path) -> None:
        self.command = [sys.executable, "jobs/finetune_model.py", *words, "--output", output.url]
        self.output, self.head, self.log = output, head, log
        self.environment = environment() | {"RAY_ADDRESS": head.address}
        self.killed: list[str] = []

    def go(self, victims: list[str], seed: int) -> float:
        """Seconds it took. victims: "worker" | "driver", in the order of their deaths."""
        rng, began = random.Random(seed), time.monotonic()
        marks = sorted(rng.sample(range(1, STEPS // CHECKPOINT_STEPS), len(victims)))
        driver = self._start()
        while driver.poll() is None:
            time.sleep(0.1)
            if time.monotonic() - began > PATIENCE:
                driver.kill()
                raise TimeoutError(f"the run did not end, see {self.log}")
            if marks and self._checkpoints() >= marks[0]:
                time.sleep(rng.uniform(*AFTER))
                if self._kill(victims[len(self.killed)], rng, driver):
                    marks.pop(0)
            if driver.poll() is not None and len(self.killed) and self.killed[-1] == "driver":
                driver = self._start()
                self.killed[-1] = "driver, again"
        if driver.returncode:
            raise RuntimeError(f"the run ended with {driver.returncode}, see {self.log}")
        return time.monotonic() - began

    def _start(self) -> subprocess.Popen:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def _checkpoints(self) -> int:
        return len(self.output.below("metrics").list("metrics-"))

    def _kill(self, victim: str, rng: random.Random, driver: subprocess.Popen) -> bool:
        """False where nobody is at work just now: after an earlier kill, say."""
        if victim == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        else:
            workers = trainers(self.head)
            if len(workers) < 2:
                return False
            with suppress(psutil.NoSuchProcess):
                rng.choice(workers).kill()
        self.killed.append(victim)
        return True


class Node:
    """A second node of a head's cluster, that can be cut off."""

    def __init__(self, head: Head) -> None:
        self.head, self.process = head, None

    def __enter__(self) -> "Node":
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += [f"--address={self.head.address}", "--num-cpus=1", f"--object-store-memory={256 << 20}"]
        log = (self.head.folder / "node.log").open("wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), start_new_session=True
        )
        return self

    def cut(self) -> None:
        """Every process of the node at once."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [*root.children(recursive=True), root]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def __exit__(self, *_: object) -> None:
        self.cut()


@click.command()
@click.option("--kills", default=10, show_default=True, help="Of workers.")
@click.option("--driver-kills", default=2, show_default=True, help="Of the driver, besides.")
@click.option("--lose-node", is_flag=True, help="Lose a node instead.")
@click.option("--parallel", default="ddp", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments of the kills.")
def main(kills: int, driver_kills: int, lose_node: bool, parallel: str, seed: int) -> None:
    """Train undisturbed, train under fire, compare; exit 1 with what is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    model = build("bert", folder / "model")
    with Ceph(folder / "ceph") as server:
        os.environ.update(server.environment())
        server.create_bucket("training")
        write_data(folder / "pairs.jsonl")
        Folder("s3://training/data").publish("pairs.jsonl", (folder / "pairs.jsonl").read_bytes())
        words = ["--data", "s3://training/data/pairs.jsonl", "--model", str(model), "--batch", 32, "--group", 3]
        words += ["--epochs", 5, "--max-steps", STEPS, "--checkpoint-steps", CHECKPOINT_STEPS, "--learning-rate", 1e-3]
        words += ["--parallel", parallel, "--token-budget", 512, "--cpus-per-worker", 1, "--max-workers", 2]
        problem = (losing if lose_node else firing)([str(word) for word in words], folder, kills, driver_kills, seed)
    if problem:
        click.echo(f"FAILED: {problem}; logs are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def firing(words: list[str], folder: Path, kills: int, driver_kills: int, seed: int) -> str:
    """What is wrong, or nothing."""
    calm_output, fire_output = Folder("s3://training/calm"), Folder("s3://training/fire")
    with Head() as head:
        calm = Run(words, calm_output, head, folder / "calm.log")
        click.echo(f"undisturbed: {calm.go([], seed):.0f} s")
        fire = Run(words, fire_output, head, folder / "fire.log")
        victims = ["worker"] * kills + ["driver"] * driver_kills
        random.Random(seed).shuffle(victims)
        click.echo(f"under fire: {fire.go(victims, seed):.0f} s, killed {', '.join(fire.killed)}")
    expected, found = losses(calm_output), losses(fire_output)
    if len(expected) != STEPS or len(found) != STEPS:
        return f"{len(found)} steps under fire, {len(expected)} undisturbed"
    if len(fire.killed) != len(victims):
        return f"only {len(fire.killed)} kills"
    different = int((expected != found).sum())
    click.echo(f"{STEPS} losses, {different} differ (by at most {np.abs(expected - found).max():.1e})")
    click.echo(f"weights {weights(calm_output)[:12]} and {weights(fire_output)[:12]}")
    if different or weights(calm_output) != weights(fire_output):
        return "another run came of it"
    return ""


def losing(words: list[str], folder: Path, *_: int) -> str:
    """What is wrong, or nothing."""
    calm_output, fire_output = Folder("s3://training/calm"), Folder("s3://training/fire")
    words += ["--min-workers", "1"]
    with Head(cpus=1) as head, Node(head) as node:
        calm = Run(words, calm_output, head, folder / "calm.log")
        click.echo(f"undisturbed, two nodes: {calm.go([], 0):.0f} s")
        run = Run(words, fire_output, head, folder / "fire.log")
        driver, began = run._start(), time.monotonic()
        while run._checkpoints() < STEPS // CHECKPOINT_STEPS // 2:
            time.sleep(0.1)
            if driver.poll() is not None:
                return f"it ended with {driver.returncode} before its node was cut"
        node.cut()
        cut = time.monotonic()
        code = driver.wait(PATIENCE)
        click.echo(f"node cut after {cut - began:.0f} s, {time.monotonic() - cut:.0f} s more, exit {code}")
    expected, found = losses(calm_output), losses(fire_output)
    if code or len(found) != STEPS or len(expected) != STEPS:
        return f"{len(found)} steps, {len(expected)} undisturbed, exit {code}"
    far = float(np.abs(expected - found).max())
    click.echo(f"{STEPS} losses, the largest difference {far:.1e}")
    return "" if far <= CLOSE else f"losses differ by {far}"


if __name__ == "__main__":
    main()

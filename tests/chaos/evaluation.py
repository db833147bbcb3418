"""An evaluation under fire: its driver and its workers are killed at random, the same command again ends with the same scores.

    python -m tests.chaos.evaluation --kills 20

Retrieval and reranking, so that every stage can be hit: vectors of passages and queries, search, join, scores. What was
published once must never be made again.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import click
import psutil

from tests.chaos.cluster import ROOT, Head, environment
from tests.support.tiny import TEXT, build, build_reranker

PASSAGES, QUERIES, EACH = 150_000, 600, 3
KILLED_OVER = 0.9  # share of the parts over which the kills are spread; little is left to kill after the last ones
DELAY = 0.5  # seconds at most from when so many parts are there to the kill; parts come fast
START_DELAY = 10.0  # the same from a driver's start, where so many were there before it; its first part takes some 8
WORKER_SHARE = 0.4  # of kills fall on a worker, the others on the driver
PATIENCE = 600.0  # seconds for a driver that is left alone


def write_data(folder: Path, seed: int) -> None:
    """A BEIR folder of random sentences; a query is the beginning of the first of its relevant passages."""
    rng = random.Random(seed)
    words = [word for text in TEXT for word in text.split()]
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 40))) for _ in range(PASSAGES)]
    (folder / "qrels").mkdir(parents=True)
    relevant = {query: rng.sample(range(PASSAGES), EACH) for query in range(QUERIES)}
    for name, rows in (
        ("corpus", [{"_id": f"p{i}", "text": text} for i, text in enumerate(texts)]),
        ("queries", [{"_id": f"q{q}", "text": texts[found[0]][:60]} for q, found in relevant.items()]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{q}\tp{p}\t{grade}" for q, found in relevant.items() for grade, p in enumerate(found, 1)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")


def parts(output: Path) -> dict[Path, tuple[int, int]]:
    """Every published part with its inode and time, which change when it is put again."""
    found = {}
    for path in output.rglob("part-*.parquet"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found[path] = stat.st_ino, stat.st_mtime_ns
    return found


def stage(part: Path) -> str:
    """The part's folder without its key, which has the place of the data in it."""
    return re.sub(r"-[0-9a-f]{12}", "", part.parent.name)


def scores(output: Path) -> dict[str, float]:
    (path,) = (output / "results").rglob("*.json")
    return json.loads(path.read_text())["scores"]


class Fire:
    """Kills until there were enough. rewritten: parts that were seen, and were put again later."""

    def __init__(
        self, command: list[str], head: Head, output: Path, log: Path, kills: int, seed: int, whole: int
    ) -> None:
        """whole: parts of an undisturbed run."""
        self.command, self.head, self.output, self.log = command, head, output, log
        self.wanted, self.random = kills, random.Random(seed)
        self.due_at = sorted(self.random.uniform(0, KILLED_OVER * whole) for _ in range(kills))  # parts
        self.kills = {"driver": 0, "worker": 0}
        self.stages: Counter[str] = Counter()  # the newest folder of parts at each kill
        self.seen: dict[Path, tuple[int, int]] = {}
        self.rewritten: list[Path] = []
        self.lives = 0

    def burn(self) -> str:
        """Start and kill until a driver ended by itself; its exit, and why that is wrong, or nothing."""
        while True:
            self.lives += 1
            with self.log.open("ab") as log:
                driver = subprocess.Popen(self.command, cwd=ROOT, env=self._environment(), stdout=log, stderr=log)
            killed = self._live(driver)
            self.look()
            if not killed:
                missing = self.wanted - sum(self.kills.values())
                early = f"it ended with {missing} kills to go: give more passages" if missing > 0 else ""
                return f"exit {driver.returncode}" if driver.returncode else early

    def look(self) -> None:
        """Often: a part put twice while one driver lives is seen too."""
        now = parts(self.output)
        self.rewritten += [path for path, stamp in self.seen.items() if now.get(path) != stamp]
        self.seen = now

    def _live(self, driver: subprocess.Popen) -> bool:
        """True when the driver was killed."""
        began = time.monotonic()
        due = began + self.random.uniform(0, START_DELAY) if self._is_late() else None
        while driver.poll() is None:
            time.sleep(0.1)
            self.look()
            now = time.monotonic()
            if now > began + PATIENCE:
                driver.kill()
            if not self._is_late():
                continue
            due = due or now + self.random.uniform(0, DELAY)
            if now < due:
                continue
            workers = self.head.workers()
            if workers and self.random.random() < WORKER_SHARE:
                with suppress(psutil.NoSuchProcess):
                    self.random.choice(workers).kill()
                    self._count("worker")
                due = None
                continue
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            self._count("driver")
            return True
        return False

    def _is_late(self) -> bool:
        """Whether the parts of the next kill are there."""
        killed = sum(self.kills.values())
        return killed < self.wanted and len(self.seen) >= self.due_at[killed]

    def _count(self, victim: str) -> None:
        self.kills[victim] += 1
        newest = max(self.seen, key=lambda path: self.seen[path][1], default=None)
        self.stages[stage(newest) if newest else "nothing"] += 1

    def _environment(self) -> dict[str, str]:
        return environment() | {"RAY_ADDRESS": self.head.address}


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the data and of the moments of the kills.")
def main(kills: int, seed: int) -> None:
    """Evaluate undisturbed, evaluate under fire, compare; exit 1 with what is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    write_data(folder / "data", seed)
    encoder = build("bert", folder / "encoder", pooling="mean", normalize=True)
    reranker = build_reranker("bert", folder / "reranker")
    line = [
        sys.executable,
        "jobs/evaluate_model.py",
        "--dataset",
        folder / "data",
        "--model",
        encoder,
        "--dtype",
        "float32",
    ]
    line += ["--reranker", reranker, "--rerank-top", 20, "--output"]
    command = [str(word) for word in line]
    with Head() as head:
        calm = Fire([*command, str(folder / "calm")], head, folder / "calm", folder / "calm.log", 0, seed, 0)
        began = time.monotonic()
        problems = [calm.burn()]
        click.echo(f"undisturbed: {time.monotonic() - began:.0f} s, {len(calm.seen)} parts")
        began = time.monotonic()
        fire = Fire(
            [*command, str(folder / "out")], head, folder / "out", folder / "out.log", kills, seed, len(calm.seen)
        )
        problems.append(fire.burn())
        click.echo(f"under fire: {time.monotonic() - began:.0f} s, {fire.lives} drivers, kills {fire.kills}")
        click.echo(f"newest parts at the kills: {dict(fire.stages)}")
    problems += [f"{len(fire.rewritten)} parts were made again: {fire.rewritten[:3]}"] if fire.rewritten else []
    made = [Counter(map(stage, each.seen)) for each in (calm, fire)]
    problems += [f"parts by stage: {dict(made[1])}, undisturbed {dict(made[0])}"] if made[0] != made[1] else []
    click.echo(f"{len(fire.seen)} parts, {len(fire.rewritten)} made again; {len(calm.seen)} undisturbed")
    if not any(problems):
        problems += ["other scores"] if scores(folder / "calm") != scores(folder / "out") else []
        click.echo(
            f"NDCG@10 {scores(folder / 'out')['ndcg_at_10']:.6f}, undisturbed {scores(folder / 'calm')['ndcg_at_10']:.6f}"
        )
    if any(problems):
        click.echo(f"FAILED: {'; '.join(filter(None, problems))}; logs are in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)
    click.echo("the same scores, and nothing made twice")


if __name__ == "__main__":
    main()

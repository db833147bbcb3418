"""Runs of the index benchmark: what is done already, processes pinned to cores with the memory of each, and whole builds."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.index_vectors import Vectors
from benchmarks.process import ENVIRONMENT, ROOT
from lib.index.build.layout import CARD

INTERVAL = 0.4  # seconds between two looks at the memory
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """folder: of results.json and of what the runs leave, under names made of their keys."""

    folder: Path
    vectors: Vectors
    options: Row

    @property
    def results(self) -> dict[str, Row]:
        path = self.folder / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def key(self, number: int, *words: object) -> str:
        """Names a run by all that fixes it."""
        o = self.options
        named = [
            self.vectors.folder.name,
            f"{o['cores']} cores",
            f"{o['lists'] or 'auto'} lists",
            o["metric"],
            f"{o['queries']} queries",
            f"round {number}",
        ]
        return "/".join(map(str, [*named, *words]))

    def file(self, key: str, suffix: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.{suffix}"

    def once(self, key: str, make: Callable[[], Row]) -> Row:
        """The row under this key, made where there is none."""
        if key not in self.results:
            click.echo(f"{key} ...", err=True)
            row = {"at": datetime.now().isoformat(timespec="minutes"), "load": os.getloadavg()[0]}
            row |= make()
            path = self.folder / "results.json"
            path.with_suffix(".new").write_text(json.dumps(self.results | {key: row}, indent=1))
            path.with_suffix(".new").rename(path)
            click.echo(f"{key}: {row['wall']:.1f} s", err=True)
        return self.results[key]


def run(command: Sequence[object], log: Path, cores: int) -> Row:
    """Run on the first cores of those there are; Ray takes the machine for one of so many.

    wall: seconds. processes: the most bytes of each by their kind, the largest first. total: the most that all took together
    at one time, shared memory once. Raises ClickException with the end of the log when it fails.
    """
    pinned = sorted(os.sched_getaffinity(0))[:cores]
    environment = (
        os.environ | ENVIRONMENT | {"RAY_ADDRESS": "local", "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cores})}
    )
    words, seen, most = [str(word) for word in command], dict[int, Row](), 0
    before, began = shared_memory(), time.perf_counter()
    with log.open("w") as file:
        started = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, pinned)), *words], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        try:
            while not _ended(started):
                unshared = sum(_look(process, seen) for process in _below(started.pid))
                most = max(most, unshared + shared_memory() - before)
        finally:
            started.terminate()  # when we are stopped ourselves
    wall = time.perf_counter() - began
    if started.returncode:
        said = log.read_text()[-3000:]
        raise click.ClickException(f"{shlex.join(words)} ended with {started.returncode}:\n{said}")
    processes = sorted(seen.values(), key=lambda each: -each["unshared"])
    return {"wall": wall, "processes": processes, "total": most}


def _ended(process: subprocess.Popen) -> bool:
    try:
        process.wait(INTERVAL)
    except subprocess.TimeoutExpired:
        return False
    return True


def _below(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _look(process: psutil.Process, seen: dict[int, Row]) -> int:
    """Note a process's memory; what it shares with nobody, now."""
    try:
        memory, words = process.memory_info(), process.cmdline()
    except psutil.Error:
        return 0
    unshared = memory.rss - memory.shared
    known = seen.setdefault(process.pid, {"name": "", "unshared": 0, "rss": 0, "kernel_rss": 0})
    if unshared >= known["unshared"]:
        known |= {"name": name_of(words), "unshared": unshared}
    known["rss"] = max(known["rss"], memory.rss)
    known["kernel_rss"] = max(known["kernel_rss"], _kernel_peak(process.pid), memory.rss)
    return unshared


def _kernel_peak(pid: int) -> int:
    """The most resident bytes at any time, as the kernel kept them: between two looks, too."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def name_of(words: Sequence[str]) -> str:
    """A process without paths: Ray's own title, or the program, and the script that it runs."""
    if not words:
        return ""
    if words[0].startswith("ray::"):
        return words[0]
    script = next((word for word in words[1:] if word.endswith(".py") or word.startswith("benchmarks.")), "")
    return " ".join(filter(None, (Path(words[0]).name, Path(script).name)))


def shared_memory() -> int:
    """Bytes of the machine's shared memory, where Ray's object store lies."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Shmem:"))


def job(bench: Bench, key: str, kind: str, cores: int, workers: int, limit: int | None = None) -> tuple[Row, Path]:
    """A whole build in a fresh folder: what it cost and its card; and the folder."""
    output, seconds = bench.folder / "output", bench.file(key, "ray")
    shutil.rmtree(output, ignore_errors=True)
    line: list[object] = ["--input", bench.vectors.folder, "--output", output, "--kind", kind]
    line += ["--max-workers", workers, "--cpus-per-worker", 1, "--recall-queries", bench.options["queries"]]
    line += ["--metric", bench.options["metric"]]
    for name, value in (("--lists", bench.options["lists"]), ("--limit", limit)):
        line += [name, value] if value else []
    warm(bench.vectors.files)
    row = run([sys.executable, "-m", "benchmarks.index_job", seconds, *line], bench.file(key, "log"), cores)
    card = json.loads((output / CARD).read_text())
    del card["encoder"]
    return row | {"ray": float(seconds.read_text()), "seconds": card["seconds"], "card": card}, output


def warm(files: Sequence[Path]) -> None:
    """Into the page cache, for whoever comes first."""
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass

"""A Ray head of our own on free ports, that outlives every driver, and what runs below it."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tests.real.s3 import free_port

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
START_PATIENCE = 90.0  # seconds; 4 on a quiet machine
OBJECT_STORE = 512 << 20  # bytes
PORTS = ("ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent")


def environment() -> dict[str, str]:
    """Of the head and of every driver: no authentication, and `lib` of this checkout in every worker."""
    return os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 starves them on a machine that does anything else
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
    }


class Head:
    """`with Head() as head`: a one-node Ray cluster at `head.address`; at the end no process of it is left."""

    def __init__(self, cpus: int = 2):
        self.cpus = cpus
        self.address = f"{HOST}:{free_port()}"
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-ray-"))  # short: Ray's socket names stop at 107 characters
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        log = (self.folder / "head.log").open("wb")
        self.process = subprocess.Popen(
            self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), start_new_session=True
        )
        try:
            self._wait(self.process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the tree by pid; children orphaned by their parent's end were counted before it."""
        family = self.family()
        for process in family:
            _kill(process)
        _, alive = psutil.wait_procs(family, timeout=10)
        if alive:
            raise RuntimeError(f"processes of the head are still there: {alive}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def family(self) -> list[psutil.Process]:
        """The head and everything below it, now."""
        if self.process is None:
            return []
        try:
            root = psutil.Process(self.process.pid)
            return [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """Processes that do shards: those with a model, and those that read, prepare or publish."""
        return [process for process in self.family() if _does_shards(process)]

    def _command(self) -> list[str]:
        ports = [f"--{name}-port={free_port()}" for name in PORTS]
        return [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--node-ip-address={HOST}", f"--port={self.address.split(':')[1]}", f"--num-cpus={self.cpus}"),
            *("--num-gpus=0", f"--object-store-memory={OBJECT_STORE}", "--include-dashboard=false"),
            *(f"--temp-dir={self.folder}", *ports),
        ]

    def _wait(self, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + START_PATIENCE
        log = self.folder / "head.log"
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray head did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)


def _does_shards(process: psutil.Process) -> bool:
    """Whether it is a worker, by the title that Ray gives it: `ray::MapWorker(...)` and `ray::MapBatches(...)` on Ray Data,
    `ray::ShardWorker` in the actor pool, also while it is idle between two stages."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and ("Map" in title or "ShardWorker" in title)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()

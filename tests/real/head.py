"""A real Ray head on this machine, `ray start --head`, that lives and dies with a test."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil


class Head:
    """`with Head(cwd, python) as head`: `head.address` for drivers, `head.submit(...)` for jobs. Ends its own processes."""

    def __init__(self, cwd: Path, python: str = sys.executable, cpus: int = 2, labels: str = "") -> None:
        self.cwd, self.python, self.cpus, self.labels = cwd, python, cpus, labels
        self.port, self.dashboard, *self.others = free_ports(5)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The python of the head comes first in PATH: it is the one that `ray job submit -- python` runs."""
        folder = os.path.dirname(self.python)
        gone = ("RAY_", "PYTHONPATH", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
        return kept | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def __enter__(self) -> "Head":
        """Started, on the same ports each time."""
        self.temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
        client, agent, metrics = self.others
        words = [
            *(
                "start",
                "--head",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--port={self.port}",
                f"--num-cpus={self.cpus}",
            ),
            *(f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={client}", "--include-dashboard=true"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
            *(f"--temp-dir={self.temporary}", "--object-store-memory=300000000", f"--labels={self.labels}"),
        ]
        program = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
        log = open(f"{self.temporary}/head.out", "wb")
        self.process = subprocess.Popen(
            [self.python, "-c", program, *words], cwd=self.cwd, env=self.environment, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.dashboard}/api/version", timeout=2)
                return self
            except OSError:
                time.sleep(0.3)
        said = Path(f"{self.temporary}/head.out").read_text()[-2000:]
        self.__exit__()
        raise RuntimeError(f"the Ray head did not come up: {said}")

    def __exit__(self, *_: object) -> None:
        """Killed, with the drivers of its jobs and all workers."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for child in family:
            if child.is_running():
                child.kill()
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def submit(self, *words: str, cwd: Path) -> subprocess.CompletedProcess:
        """`ray job submit WORDS`, run in `cwd`."""
        program = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
        line = [
            sys.executable,
            "-c",
            program,
            "job",
            "submit",
            "--address",
            f"http://127.0.0.1:{self.dashboard}",
            *words,
        ]
        return subprocess.run(line, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=240)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

"""Several hosts on this machine, with a cable each: network namespaces on a bridge, joined to a Ray cluster by `ray start`.

    with Ceph(folder / "ceph") as server, Hosts(3, folder / "hosts") as hosts:
        with FaultProxy("127.0.0.1", server.ports["s3"], hosts.gateway) as proxy:  # S3 at an address of its own
            hosts.start_ray({"AWS_ENDPOINT_URL": proxy.endpoint, ...})
            driver = hosts.head.run("python", "jobs/embed_corpus.py", ...)
            hosts.workers[0].cut(); hosts.workers[0].restore(); hosts.workers[1].kill(); hosts.workers[1].start()

A host has its own network, process ids, name, /dev/shm and /tmp/ray; the disk is everybody's. Its init starts Ray again and
again, as systemd or Kubernetes would. Hosts die with the *thread* that started them, as the servers of s3.py do.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from tests.real.health import HEALTH
from tests.real.s3 import DIE_WITH_PARENT

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SUBNETS = 200  # 10.77.0.0/24 to 10.77.199.0/24; a run takes one
FIRST = 11  # the last number of the head's address
PORT = 6379
DASHBOARD = "http://127.0.0.1:8265"  # seen from the head's network alone
START_PATIENCE = 120.0  # seconds; 10 on a quiet machine
OBJECT_STORE = 128 << 20  # bytes
STARTED = "Ray runtime started"
NAMESPACES = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
INIT = """
hostname "$0" && mount -t tmpfs -o size=512m tmpfs /dev/shm && mount --bind "$1" /tmp/ray && mount --bind "$2" /etc/hosts
shift 2
while :; do "$@"; sleep 1; done
"""


def missing() -> str:
    """Why there can be no hosts here; nothing where there can."""
    if absent := [tool for tool in ("ip", "unshare", "nsenter", "mount") if not shutil.which(tool)]:
        return f"no {', '.join(absent)}: install iproute2 and util-linux"
    trial = ["unshare", "--net", *NAMESPACES, "ip", "link", "add", "trial", "type", "bridge"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"no network namespaces, which take root: {done.stderr.strip()}" if done.returncode else ""


class Host:
    """One host: `start` and `kill` are its power switch, `cut` and `restore` its cable."""

    def __init__(self, hosts: "Hosts", number: int, name: str):
        self.name, self.address = name, f"{hosts.subnet}.{FIRST + number}"
        self.network, self.cable = f"{hosts.name}-{number}", f"{hosts.name}v{number}"
        self.log = hosts.folder / f"{name}.log"
        self._ray, self._names = hosts.folder / name, hosts.folder / "names"
        self._command: list[str] = []
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen | None = None

    def plug_in(self, bridge: str) -> None:
        self._ray.mkdir(parents=True)
        ip("netns", "add", self.network)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.network)
        ip("link", "set", self.cable, "master", bridge, "up")
        ip("-n", self.network, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.network, "link", "set", "eth0", "up")
        ip("-n", self.network, "link", "set", "lo", "up")
        ip("-n", self.network, "route", "add", "default", "via", f"{self.address.rsplit('.', 1)[0]}.1")

    def boot(self, command: list[str], environment: dict[str, str]) -> None:
        """Switch on: `command` runs, and runs again whenever it ends."""
        self._command, self._environment = command, environment
        self.start()

    def start(self) -> None:
        """Switch on again, with what it ran before."""
        init = ["bash", "-c", INIT, self.name, str(self._ray), str(self._names), *self._command]
        line = [*DIE_WITH_PARENT, "ip", "netns", "exec", self.network, "unshare", *NAMESPACES, *init]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=self._environment
            )
        while self.init() is None and self._process.poll() is None:
            time.sleep(0.01)

    def kill(self) -> None:
        """Power off: SIGKILL for its init, and with it for every process of the host."""
        if self._process is None:
            return
        for process in (self.init(), self._process):
            if process:
                process.kill()
        self._process.wait()
        self._process = None

    def cut(self) -> None:
        """Pull the cable out of the switch: what is sent is lost, and nobody is told."""
        ip("link", "set", self.cable, "down")

    def restore(self) -> None:
        ip("link", "set", self.cable, "up")

    def init(self) -> psutil.Process | None:
        """Process 1 of the host, as seen from here."""
        try:
            return next(iter(psutil.Process(self._process.pid).children()), None) if self._process else None
        except psutil.NoSuchProcess:
            return None

    def run(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a command on the host, as over ssh: in the checkout, with the host's environment."""
        init = self.init()
        if init is None:
            raise RuntimeError(f"{self.name} is off")
        inside = ["nsenter", "-t", str(init.pid), "-m", "-u", "-n", "-p", "env", "-C", str(ROOT), *command]
        return subprocess.Popen(inside, env=self._environment, stdin=subprocess.DEVNULL, **options)

    def run_near(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start a command of this machine in the host's network, as through a tunnel: it outlives the host."""
        line = [*DIE_WITH_PARENT, "ip", "netns", "exec", self.network, *command]
        return subprocess.Popen(line, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, **options)

    def titles(self) -> list[str]:
        """Command lines of the host's processes; Ray titles a worker by what it does."""
        titles, init = [], self.init()
        for process in init.children(recursive=True) if init else []:
            with suppress(psutil.Error):
                titles.append(" ".join(process.cmdline()))
        return titles

    def starts(self) -> int:
        """How often Ray has come up here."""
        return self.log.read_text(errors="replace").count(STARTED) if self.log.exists() else 0


class Hosts:
    """`with Hosts(3, folder) as hosts`: a head and two workers, plugged in; at the end nothing of them is left but logs."""

    def __init__(self, count: int, folder: Path):
        self.count, self.folder = count, Path(folder).resolve()
        self.name = self.subnet = ""
        self.all: list[Host] = []

    @property
    def gateway(self) -> str:
        """The address of this machine among the hosts."""
        return f"{self.subnet}.1"

    @property
    def head(self) -> Host:
        return self.all[0]

    @property
    def workers(self) -> list[Host]:
        return self.all[1:]

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # each host has its own folder mounted there
        try:
            self._claim_subnet()
            names = ["head", *(f"worker{i}" for i in range(1, self.count))]
            self.all = [Host(self, i, name) for i, name in enumerate(names)]
            lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in self.all)]
            (self.folder / "names").write_text("\n".join(lines) + "\n")
            for host in self.all:
                host.plug_in(self.name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in reversed(self.all):
            host.kill()
        for host in self.all:
            ip("link", "del", host.cable, check=False)
            ip("netns", "del", host.network, check=False)
        ip("link", "del", self.name, check=False)

    def start_ray(self, environment: dict[str, str], cpus: int = 2) -> None:
        """Boot every host into one cluster; `environment`: of Ray and of every driver, beside what a cluster here needs.

        Two CPUs, or more: a pool of workers of one CPU each would leave Ray Data's own tasks no whole one.
        """
        token = self.folder / "token"
        token.write_text(f"{random.randbytes(24).hex()}\n")
        env = self._environment(token) | environment
        self.head.boot(_ray(self.head, cpus, "--head", f"--port={PORT}", "--include-dashboard=true"), env)
        self.wait(self.head)
        for host in self.workers:
            host.boot(_ray(host, cpus, f"--address={self.head.address}:{PORT}"), env)
        for host in self.workers:
            self.wait(host)

    def wait(self, host: Host, starts: int = 1) -> None:
        """Until Ray has come up on the host so many times."""
        deadline = time.monotonic() + START_PATIENCE
        while host.starts() < starts:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {host.name}:\n{host.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)

    def _environment(self, token: Path) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VIRTUAL_ENV"))}
        return {
            **kept,
            **HEALTH,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": f"{self.head.address}:{PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 starves them on a machine that does anything else
            "HF_HUB_OFFLINE": "1",
        }

    def _claim_subnet(self) -> None:
        """The bridge's name says the subnet, and making it is the claim: two runs never share one."""
        for number in random.sample(range(SUBNETS), SUBNETS):
            if ip("link", "add", f"shoal{number}", "type", "bridge", check=False):
                self.name, self.subnet = f"shoal{number}", f"10.77.{number}"
                ip("addr", "add", f"{self.gateway}/24", "dev", self.name)
                ip("link", "set", self.name, "up")
                return
        raise RuntimeError("no bridge could be made")


def _ray(host: Host, cpus: int, *place: str) -> list[str]:
    size = (f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}")
    at = f"--node-ip-address={host.address}"
    return [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *size, at, *place]


def ip(*words: str, check: bool = True) -> bool:
    """`ip WORDS`; whether it went well."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.returncode == 0

"""Real S3 servers on loopback, each within a folder: Ceph's RADOS gateway and OpenStack Swift.

    with Ceph(folder) as server:                    # or Swift(folder); 5 s when fresh
        os.environ.update(server.environment())
        server.create_bucket("corpus")
        server.kill(); server.start()               # SIGKILL, then back with every acknowledged byte

Ceph is durable and creates atomically; Swift accepts what Ceph refuses and refuses what Ceph accepts: code that passes on both
leans on no quirk. By hand: `python tests/real/s3.py ceph FOLDER [PORT]` serves until Ctrl-C.

Servers die with the *thread* that started them (PR_SET_PDEATHSIG), so a killed pytest leaves none: start them in the main thread.
"""

import getpass
import http.client
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Self

import botocore.config
import botocore.exceptions
import botocore.session

HOST = "127.0.0.1"
CONF = Path(__file__).with_name("conf")
START_PATIENCE = 90.0  # seconds; 5 on a quiet machine
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def free_port() -> int:
    """A port below the kernel's range for outgoing connections, so that no client takes it while its server restarts."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((HOST, port))
            except OSError:
                continue
            return port


class Server:
    """Processes, ports and logs of one server; `_prepare` writes its files once, `_run` spawns what is not running."""

    access_key = "test"
    secret_key = "testsecret"
    port_names: tuple[str, ...] = ()  # those besides the front's
    front = ""  # the process that `kill` kills; empty for all of them

    def __init__(self, folder: Path, port: int | None = None):
        self.folder = Path(folder).resolve()
        self.processes: dict[str, subprocess.Popen] = {}
        kept = self.folder / "ports.json"
        self.ports = (
            json.loads(kept.read_text()) if kept.exists() else {n: free_port() for n in ("s3", *self.port_names)}
        )
        self.ports["s3"] = port or self.ports["s3"]

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.ports['s3']}"

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start whatever is not running, with the data that is there, and wait until S3 answers."""
        fresh = not (self.folder / "ready").exists()
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "log").mkdir(parents=True)
            self._prepare()
        self._run(fresh)
        self._until(self._answers, "S3 answers")
        (self.folder / "ports.json").write_text(json.dumps(self.ports))
        (self.folder / "ready").touch()

    def kill(self) -> None:
        """SIGKILL the front: requests under way are cut, `start` brings it back."""
        self._end(signal.SIGKILL, [self.front] if self.front else list(self.processes))

    def kill_all(self) -> None:
        """SIGKILL every process; the data stays."""
        self._end(signal.SIGKILL, list(self.processes))

    def client(self):
        """A botocore client, for what a test must see or do behind the product's back."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(
                s3={"addressing_style": "path"}, request_checksum_calculation="when_required"
            ),
        )

    def create_bucket(self, name: str) -> None:
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":  # Ceph answers 200, Swift 409
                raise

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    def _prepare(self) -> None:
        raise NotImplementedError

    def _run(self, fresh: bool) -> None:
        raise NotImplementedError

    def _spawn(self, name: str, *command: str | Path) -> None:
        if name in self.processes:
            return
        with open(self._log(name), "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*DIE_WITH_PARENT, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _end(self, with_signal: signal.Signals, names: list[str]) -> None:
        """The front goes first, so that nobody is answered by half a server."""
        for name in reversed(names):
            self.processes[name].send_signal(with_signal)
        for name in reversed(names):
            process = self.processes.pop(name)
            try:
                process.wait(2)  # radosgw lingers over open connections
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.out"

    def _until(self, condition, what: str) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while not condition():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {n}:\n{self._log(n).read_text(errors='replace')[-1500:]}" for n in dead or self.processes
                )
                raise RuntimeError(f"{type(self).__name__}: waited for '{what}'; ended: {dead or 'none'}\n{logs}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            connection = http.client.HTTPConnection(HOST, self.ports["s3"], timeout=5)
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except OSError:
            return False


class Ceph(Server):
    """One monitor, one disk, one gateway. Creates atomically (If-None-Match); answers 411 to bodies sent in chunks."""

    port_names = ("mon",)
    front = "rgw"
    tools = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")

    @classmethod
    def missing(cls) -> str:
        absent = [tool for tool in cls.tools if not shutil.which(tool)]
        return f"no {', '.join(absent)}: run tests/real/install.sh as root on Debian or Ubuntu" if absent else ""

    def _prepare(self) -> None:
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        cluster, mon_map = str(uuid.uuid4()), self.folder / "monmap"
        self._conf.write_text(
            _filled("ceph.conf", cluster=cluster, folder=self.folder, host=HOST, mon=self.ports["mon"])
        )
        self._tool(
            "monmaptool", "--create", "--fsid", cluster, "--addv", "a", f"[v2:{HOST}:{self.ports['mon']}]", mon_map
        )
        self._tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", mon_map)

    def _run(self, fresh: bool) -> None:
        self._spawn("mon", "ceph-mon", "-c", self._conf, "-i", "a", "-f")
        if fresh:
            disk = str(uuid.uuid4())
            self._tool("ceph", "osd", "new", disk)
            self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._spawn("osd", "ceph-osd", "-c", self._conf, "-i", "0", "-f")
        if fresh:
            user = (
                "--uid=test",
                "--display-name=test",
                f"--access-key={self.access_key}",
                f"--secret-key={self.secret_key}",
            )
            self._tool("radosgw-admin", "-n", "client.rgw", "user", "create", *user)
        frontend = f"beast endpoint={HOST}:{self.ports['s3']}"
        self._spawn("rgw", "radosgw", "-c", self._conf, "-n", "client.rgw", "-f", "--rgw-frontends", frontend)

    @property
    def _conf(self) -> Path:
        return self.folder / "ceph.conf"

    def _tool(self, program: str, *arguments: str | Path) -> None:
        command = [program, "-c", self._conf, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_PATIENCE)
        if done.returncode:
            raise RuntimeError(
                f"{program} {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stderr[-1500:]}"
            )


class Swift(Server):
    """Account, container, object and proxy server with s3api. Creating is not atomic: racers may overwrite one another."""

    access_key = "test:test"
    port_names = ("account", "container", "object")
    programs = Path(__file__).resolve().parents[2] / ".swift" / "bin"

    @classmethod
    def missing(cls) -> str:
        return (
            "" if (cls.programs / "swift-proxy-server").exists() else "no .swift environment: run tests/real/install.sh"
        )

    def _prepare(self) -> None:
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(_filled("swift.conf"))
        for name in self.port_names:
            ring = self.folder / f"{name}.builder"
            place = f"r1z1-{HOST}:{self.ports[name]}/d1"
            for arguments in (("create", "4", "1", "1"), ("add", place, "100"), ("rebalance",)):
                subprocess.run(
                    [self.programs / "swift-ring-builder", ring, *arguments], check=True, capture_output=True
                )

    def _run(self, fresh: bool) -> None:
        for name in (*self.port_names, "proxy"):
            port = self.ports["s3" if name == "proxy" else name]
            kind = "swift-proxy.conf" if name == "proxy" else "swift-backend.conf"
            conf = self.folder / f"{name}.conf"
            conf.write_text(_filled(kind, folder=self.folder, host=HOST, port=port, user=getpass.getuser(), name=name))
            if name == "proxy":  # it shuns for a minute a backend that was not up when asked
                self._until(lambda: all(_listens(self.ports[n]) for n in self.port_names), "the backends listen")
            self._spawn(name, self.programs / f"swift-{name}-server", conf)


def _filled(conf: str, **values: object) -> str:
    return (CONF / conf).read_text().format(**values)


def _listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex((HOST, port)) == 0


def main() -> None:
    kind, folder, *port = sys.argv[1:]
    with {"ceph": Ceph, "swift": Swift}[kind](Path(folder), int(port[0]) if port else None) as server:
        print("\n".join(f"export {name}={value}" for name, value in server.environment().items()), flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()

"""Our cluster YAML on this machine: its provider swapped for Ray's fake one, whose nodes are processes here.

    with Autoscaled(yaml.safe_load(...), folder) as cluster:
        job = cluster.submit("--working-dir", ".", "--", "python", "jobs/embed_corpus.py", ...)
        cluster.nodes()                             # {"l4-spot": 2}

Node types, resources, labels, priorities, limits and the variables of the head's start line stay the file's. All processes are in
a PID namespace of their own, so that none outlives the head: Ray's fake nodes would.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tests.real.head import free_ports
from tests.real.s3 import DIE_WITH_PARENT

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"  # what the fake provider takes for the head
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
LABELS = ("ray.io/accelerator-type", "ray.io/market-type")
IDLE_MINUTES = 0.15
OBJECT_STORE = 150_000_000  # bytes a node
START_PATIENCE = 120.0  # seconds; 10 on a quiet machine
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def missing() -> str:
    """Why it cannot run here, or nothing."""
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"needs root for namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def start_line(commands: list[str]) -> tuple[dict[str, str], list[str]]:
    """Of the `ray start` among commands: the variables before it, and the options after it."""
    (line,) = (command for command in commands if "ray start" in command)
    words = shlex.split(line)
    place = words.index("start")
    return dict(word.split("=", 1) for word in words[: place - 1] if re.match(r"\w+=", word)), words[place + 1 :]


def faked(config: Mapping[str, Any], gcs: str, provider: str) -> dict[str, Any]:
    """The config with another provider, and without what is for machines that must be set up."""
    types = {name: _faked_type(kind) for name, kind in config["available_node_types"].items()}
    types[HEAD_TYPE] = types.pop(config["head_node_type"]) | {"max_workers": 0}
    gone = {"docker": {}, "file_mounts": {}, "auth": {}} | {f"{name}_commands": [] for name in COMMANDS}
    said = {
        "type": "external",
        "module": provider,
        "gcs_address": gcs,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
    }
    said |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    synced = {"cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": []}
    return {
        **config,
        **gone,
        **synced,
        "provider": said,
        "available_node_types": types,
        "head_node_type": HEAD_TYPE,
        "idle_timeout_minutes": IDLE_MINUTES,
        "file_mounts_sync_continuously": False,
    }


def _faked_type(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Without `memory`, which the fake provider takes for a resource of our own and refuses."""
    resources = {k: v for k, v in kind["resources"].items() if k != "memory"}
    resources["object_store_memory"] = OBJECT_STORE
    return {k: v for k, v in kind.items() if k != "docker"} | {"node_config": {}, "resources": resources}


def _ours(labels: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """Of a node's labels, those that the file gives; Ray adds others."""
    return frozenset((key, labels[key]) for key in LABELS if key in labels)


class Autoscaled:
    """A head with a dashboard and the autoscaler of `config`, and the nodes it starts. `folder` holds logs and sockets."""

    def __init__(self, config: Mapping[str, Any], folder: Path, provider: str = PROVIDER):
        self.config, self.folder, self.provider = config, folder, provider
        self.port, self.dashboard, *self.others = free_ports(5)
        self.process: subprocess.Popen | None = None
        self.token = secrets.token_hex(32)
        kinds = config["available_node_types"]
        self.types = {_ours(kind["labels"]): name for name, kind in kinds.items() if name != config["head_node_type"]}

    @property
    def environment(self) -> dict[str, str]:
        """The start line's variables, and those by which the fake provider knows the head."""
        gone = ("RAY_", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(gone)}
        folder = str(Path(sys.executable).parent)
        variables, _ = start_line(self.config["head_start_ray_commands"])
        return (
            kept
            | variables
            | {
                "PATH": f"{folder}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),  # the provider of a test is imported by its name
                "HF_HUB_OFFLINE": "1",
                "RAY_AUTH_TOKEN": self.token,
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            }
        )

    def __enter__(self) -> Self:
        ray = self.folder / "ray"
        ray.mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        own = f'mount --bind {shlex.quote(str(ray))} /tmp/ray; exec "$@"'
        namespaces = [
            *DIE_WITH_PARENT,
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            own,
            "_",
        ]
        log = (self.folder / "head.log").open("wb")
        self.process = subprocess.Popen(
            [*namespaces, *self._command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
        )
        try:
            self._wait(self.process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """The end of its first process is the end of all in a PID namespace."""
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.folder / "ray", ignore_errors=True)

    def nodes(self) -> Counter[str]:
        """Live nodes beside the head, by type, which their labels tell."""
        rows = self._ask("/api/v0/nodes?limit=1000&detail=1")["data"]["result"]["result"]
        live = [row["labels"] for row in rows if row["state"] == "ALIVE" and not row["is_head_node"]]
        return Counter(self.types[_ours(labels)] for labels in live)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[float, Counter[str]]]]:
        """Seconds since the beginning and the nodes then, each time that these change."""
        began, over = time.monotonic(), threading.Event()
        seen = [(0.0, self.nodes())]

        def look() -> None:
            with suppress(OSError):  # a busy head answers the next time
                if (now := self.nodes()) != seen[-1][1]:
                    seen.append((time.monotonic() - began, now))

        def watch() -> None:
            while not over.wait(0.5):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            over.set()
            thread.join(timeout=30)
            look()

    def wait_for_none(self, patience: float) -> None:
        """Until no node but the head lives."""
        deadline = time.monotonic() + patience
        while self.nodes():
            if time.monotonic() > deadline:
                raise RuntimeError(f"after {patience:g} s there are still {dict(self.nodes())}")
            time.sleep(0.5)

    def submit(self, *words: str, patience: float) -> subprocess.CompletedProcess:
        """`ray job submit WORDS`, in the checkout; again while the head's agent, which starts jobs, is not there yet."""
        line = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
        line += ["--address", f"http://{HOST}:{self.dashboard}", *words]
        done = None
        while done is None or "No available agent" in done.stderr:
            done = subprocess.run(
                line,
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=patience,
            )
        return done

    def _command(self) -> list[str]:
        said = self.folder / "autoscaling.json"
        said.write_text(json.dumps(faked(self.config, f"{HOST}:{self.port}", self.provider)))
        client, agent, metrics = self.others
        cpus = self.config["available_node_types"][self.config["head_node_type"]]["resources"]["CPU"]
        return [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--node-ip-address={HOST}"),
            *(f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={client}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--num-cpus={cpus}"),
            *("--num-gpus=0", f"--object-store-memory={OBJECT_STORE}", f"--autoscaling-config={said}"),
        ]

    def _wait(self, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            try:
                self._ask("/api/version")
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"the Ray head did not come up: {(self.folder / 'head.log').read_text()[-3000:]}")

    def _ask(self, path: str) -> Any:
        request = urllib.request.Request(f"http://{HOST}:{self.dashboard}{path}")
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

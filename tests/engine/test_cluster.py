"""The cluster that a command starts where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, psutil, ray
from lib.engine.cluster import connect

connect()
ray.get(ray.remote(lambda: None).remote())
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [(each.name(), *one.laddr) for each in family for one in each.net_connections("inet") if one.status == "LISTEN"]
print(json.dumps(sockets))
"""


def test_nothing_listens_beyond_loopback():
    """Alone on a machine, no process of a run listens on an address that another machine could reach."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    line = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sockets = json.loads(done.stdout.splitlines()[-1])

    assert {"gcs_server", "raylet"} <= {name for name, *_ in sockets}
    assert {address.removeprefix("::ffff:") for _, address, _ in sockets} == {"127.0.0.1"}

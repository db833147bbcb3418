"""A contender of a benchmark runs in a process of its own, from the repository's root, without asking a model hub."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


def run_python(contender: str, arguments: Sequence[str]) -> str:
    """What `python ARGUMENTS` prints. Raises ClickException with the end of it when it fails."""
    line = [sys.executable, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        heard = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise click.ClickException(f"{contender} ended with {done.returncode}:\n{heard}")
    return done.stdout

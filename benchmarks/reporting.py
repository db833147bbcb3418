"""What the reports of the benchmarks share: the machine they ran on, the spread of a figure, vectors held against others."""

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "ray", "pyarrow", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median (least - most)."""
    middle, least, most = (form.format(value) for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} - {most})"


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each row of `left` with that row of `right`."""
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def machine(load: tuple[float, ...]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", facts)
    features = [each for each in FEATURES if re.search(rf"\b{each}\b", facts)]
    return [
        f"- Python {platform.python_version()}, {versions}",
        f"- {len(os.sched_getaffinity(0))} cores, {name[1] if name else platform.processor()}: {', '.join(features)}",
        f"- load average before the first run (1, 5, 15 minutes): {', '.join(f'{each:.1f}' for each in load)}",
    ]

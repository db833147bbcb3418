"""jobs/build_index.py as it is, in a process that has started Ray before it: what that takes, apart.

python -m benchmarks.index_job SECONDS.txt ARGUMENTS
"""

import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.process import ROOT
from lib.engine.cluster import connect


def main(seconds_file: str, arguments: Sequence[str]) -> None:
    began = time.perf_counter()
    connect()
    Path(seconds_file).write_text(str(time.perf_counter() - began))
    sys.argv = ["build_index.py", *arguments]
    runpy.run_path(str(ROOT / "jobs/build_index.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

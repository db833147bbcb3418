"""A run that lost some of its parts, on every executor. Kills are in tests/chaos/."""

import os

from lib.engine.run import missing
from tests.engine import test_executors
from tests.engine.test_executors import executed, opened

case, corpus = test_executors.case, test_executors.corpus  # fixtures


def test_a_resumed_run_does_only_the_missing_shards(case, corpus, tmp_path):
    """Existing parts are not made again; the manifest knows them from their footers as from receipts."""
    first = executed(case, opened(case, corpus, tmp_path))
    folder = tmp_path / "out"
    times = {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder) if name.startswith("part-")}
    removed = sorted(times)[3:5]
    for name in [*removed, "_manifest.parquet"]:
        os.unlink(folder / name)

    run = opened(case, corpus, tmp_path)
    assert missing(run) == [3, 4]
    second = executed(case, run)

    assert second.parts == first.parts  # checksums too
    assert all(os.stat(folder / n).st_mtime_ns == t for n, t in times.items() if n not in removed)
    assert missing(opened(case, corpus, tmp_path)) == []

"""The steps of a job's shards in this process, where a test is about what a verb makes and not about the engine."""

import json
from collections.abc import Sequence

import pytest

from lib import errors
from lib.cli.progress import Progress
from lib.engine.executor import Outcome
from lib.engine.job import Job, RunOptions
from lib.engine.mapper import Mapper, Prepare, Publish, Receipt, Work, pack
from lib.engine.parts import Part
from lib.engine.run import Run, audit, missing, open_ledger
from lib.engine.workers import WorkerPlan
from lib.storage.filesystem import parse_options
from lib.storage.folder import Folder

ONE = WorkerPlan(minimum=1, initial=1, maximum=1, threads=2, cpus=1.0, gpus=0.0, task_cpus=0.001)


def publish_here(job: Job, options: RunOptions) -> None:
    """Publish the parts that are missing, as the engine's processes do, without Ray. Raises the first failure."""
    storage = parse_options(options.storage_option)
    folder = Folder(options.output, storage)
    folder.probe()
    rows = options.shard_rows or 1000
    ledger = open_ledger(folder, job.settings, options, storage, options.strict, lambda corpus: rows, {})
    steps(job.verb(ledger, ONE), ledger, missing(ledger))


def steps(verb: Mapper, ledger: Run, pending: Sequence[int]) -> dict[int, Part]:
    """Take the pending shards through all three steps. Raises the first failure."""
    three, parts = (Prepare(verb), Work(verb), Publish(verb, ledger.folder, ledger.part_names())), {}
    for shard in ledger.shards(pending):
        row = pack(Receipt(shard.number), shard, {})
        for step in three:
            row = step(row)
        receipt = Receipt(**json.loads(row["receipt"][0].as_py()))
        if receipt.failure is not None:
            raise getattr(errors, receipt.error or "", RuntimeError)(receipt.failure)
        parts[shard.number] = Part(**receipt.part)
    return parts


@pytest.fixture
def here(monkeypatch):
    """Every job of the test runs its shards in this process, one after the other, without Ray."""

    def run(verb: Mapper, ledger: Run, workers: WorkerPlan, progress: Progress, pending: Sequence[int], *_) -> Outcome:
        return Outcome(audit(ledger, steps(verb, ledger, pending)), {}, progress)

    monkeypatch.setattr("lib.engine.job._connected", lambda job, options: ONE)
    monkeypatch.setattr("lib.index.build.train_job.connect", lambda: None)
    monkeypatch.setattr("lib.index.build_job.connect", lambda: None)
    monkeypatch.setattr("lib.index.build_job.check_said", lambda options, weight_bytes: None)
    monkeypatch.setattr("lib.index.build.train_job.most_cpus", lambda options: 2.0)
    monkeypatch.setattr("lib.engine.dry_run.connect", lambda: None)
    monkeypatch.setattr("lib.engine.dry_run.decide", lambda options, weight_bytes: ONE)
    monkeypatch.setattr("lib.engine.executor.execute", run)

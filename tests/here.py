"""The steps of a job's shards in this process, where a test is about what a verb makes and not about the engine."""

import json

from lib import errors
from lib.cluster import Workers
from lib.job import Job, RunOptions
from lib.ledger import missing, open_ledger
from lib.stages import Prepare, Publish, Receipt, Work, pack
from lib.storage import Folder, parse_options

ONE = Workers(minimum=1, initial=1, maximum=1, threads=2, cpus=1.0, gpus=0.0, task_cpus=0.001)


def publish_here(job: Job, options: RunOptions) -> None:
    """Publish the parts that are missing, as the engine's processes do, without Ray. Raises the first failure."""
    storage = parse_options(options.storage_option)
    folder = Folder(options.output, storage)
    folder.probe()
    rows = options.shard_rows or 1000
    ledger = open_ledger(folder, job.settings, options, storage, options.strict, lambda corpus: rows, {})
    verb, names = job.verb(ledger, ONE), ledger.part_names()
    steps = Prepare(verb), Work(verb), Publish(verb, folder, names)
    for shard in ledger.shards(missing(ledger)):
        row = pack(Receipt(shard.number), shard, {})
        for step in steps:
            row = step(row)
        receipt = Receipt(**json.loads(row["receipt"][0].as_py()))
        if receipt.failure is not None:
            raise getattr(errors, receipt.error or "", RuntimeError)(receipt.failure)

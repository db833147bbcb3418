"""The loss of a global batch of 65,536 rows with 7 hard negatives each, on one CPU machine, within 1.5 GB beside the vectors and
their gradients. Run by `make scale`; `python -m tests.scale.test_loss ROWS` tries it with fewer."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROWS, GROUP, DIM, MOST_BYTES = 65_536, 8, 256, 1536 << 20


def test_infonce_of_65_536_rows_within_1_5_gb():
    """InfoNCE over all 524,288 passages, forward and backward; the matrix of their logits alone would be 128 GiB."""
    command = [sys.executable, "-m", "tests.scale.test_loss", str(ROWS)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]).stdout
    measured = json.loads(found)
    print(measured)
    assert measured["bytes"] <= MOST_BYTES


def measure(count: int) -> dict[str, float]:
    """Seconds of forward and backward, and the most bytes that this process had beside vectors and their gradients."""
    import torch

    from lib.training.losses import Batch, BatchKeys
    from lib.training.losses.infonce import InfoNCE

    random = torch.Generator().manual_seed(0)
    queries = torch.randn(count, DIM, generator=random).requires_grad_()
    passages = torch.randn(count, GROUP, DIM, generator=random).requires_grad_()
    keys = torch.arange(count * GROUP).view(count, GROUP)
    batch_keys = BatchKeys(torch.arange(count), keys, keys[:, :1].clone(), None, True, 0, count, 1)
    small = Batch(_first(batch_keys, 64), queries[:64].detach(), passages[:64].detach(), lambda local: local)
    InfoNCE()(small)  # what is imported, and the threads, are there before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _peak()
    began = time.monotonic()
    value = InfoNCE()(Batch(batch_keys, queries, passages, lambda local: local))
    forward = time.monotonic() - began
    value.backward()
    seconds = time.monotonic() - began
    most = _peak()
    gradients = [queries.grad, passages.grad]
    assert all(each.isfinite().all() and each.any() for each in gradients)
    beside = most - before - sum(each.nbytes for each in gradients)
    return {"rows": count, "value": value.item(), "forward": forward, "seconds": seconds, "bytes": beside}


def _peak() -> int:
    """The most bytes of this process, from the kernel: a look twice a second misses peaks."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _first(rows, count: int):
    from dataclasses import replace

    known = {name: getattr(rows, name)[:count] for name in ("query_keys", "passage_keys", "positive_keys")}
    return replace(rows, **known, count=count)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))

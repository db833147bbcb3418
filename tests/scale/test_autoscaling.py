"""Our cluster file on Ray's fake node provider: from no worker to what the job asks for, and back. Run by `make scale`."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.real.autoscaler import Autoscaled, missing
from tests.support import tiny

ROOT = Path(__file__).parents[2]
ROWS, WORDS, SHARD_ROWS = 12_000, 60, 40  # the job must outlast the start of its third node
LAYERS = 32  # of a tiny model: enough for its workers, not the tokenizers, to be what the job waits for
NODE_CPUS = 8  # of every worker type of the file: a worker of as many is one a node
JOB_PATIENCE, END_PATIENCE = 1800.0, 300.0  # seconds; two minutes and 20 s on a quiet machine

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def cluster(tmp_path):
    with Autoscaled(yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text()), tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
def job(tmp_path, monkeypatch) -> list[str]:
    """The words of an embed job over a corpus of ROWS rows, in `tmp_path`; workers on CPUs, since here is no GPU."""
    monkeypatch.setitem(tiny.SHAPE, "num_hidden_layers", LAYERS)
    model = tiny.build("bert", tmp_path / "model", pooling="mean")
    chosen = random.Random(0)
    vocabulary = " ".join(tiny.TEXT).split()
    texts = [f"{number} {' '.join(chosen.choices(vocabulary, k=WORDS))}" for number in range(ROWS)]
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"id": range(ROWS), "text": texts}), tmp_path / "in" / "a.parquet", row_group_size=SHARD_ROWS
    )
    words = ["--working-dir", ".", "--", "python", "jobs/embed_corpus.py", "--model", model]
    words += ["--input", tmp_path / "in", "--output", tmp_path / "out", "--shard-rows", SHARD_ROWS]
    words += ["--gpus-per-worker", 0, "--cpus-per-worker", NODE_CPUS]
    return [str(word) for word in words]


def carry_out(cluster, job, *more):
    """Nodes over time, of a job and until the cluster is empty again."""
    with cluster.watched() as seen:
        done = cluster.submit(*job, *more, patience=JOB_PATIENCE)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        cluster.wait_for_none(END_PATIENCE)
    print("".join(f"\n{seconds:6.1f} s  {sum(nodes.values())} nodes  {dict(nodes)}" for seconds, nodes in seen))
    return [nodes for _, nodes in seen]


def ids(folder: Path) -> list[int]:
    return sorted(i for part in folder.glob("part-*.parquet") for i in pq.read_table(part)["id"].to_pylist())


def test_from_nothing_to_the_maximum_and_back(cluster, job, tmp_path):
    """A submitted job finds no worker, grows to the three that it may have, one a node, on the spot machines without a GPU;
    it gives every row once, and then no node is left."""
    nodes = carry_out(cluster, job, "--max-workers", "3")

    assert not nodes[0]
    assert max(sum(count.values()) for count in nodes) == 3
    assert {kind for count in nodes for kind in count} == {"cpu-spot"}
    assert not nodes[-1]
    assert ids(tmp_path / "out") == list(range(ROWS))


def test_a_label_launches_only_its_own_nodes(cluster, job, tmp_path):
    """Workers that ask for L4 on demand get nodes of that one type, and no other is launched."""
    labels = ("ray.io/accelerator-type=L4", "ray.io/market-type=on-demand")
    asked = [word for label in labels for word in ("--worker-label", label)]
    nodes = carry_out(cluster, job, "--max-workers", "2", *asked)

    assert max(count["l4-on-demand"] for count in nodes) == 2
    assert {kind for count in nodes for kind in count} == {"l4-on-demand"}
    assert not nodes[-1]
    assert ids(tmp_path / "out") == list(range(ROWS))

"""Shards that kill a process of Ray Data each time. Run by `make scale`."""

from tests.engine import test_executors
from tests.engine.test_executors import RAY_DATA

corpus = test_executors.corpus  # fixture


def test_poison_shards_are_quarantined(cluster, corpus, tmp_path, monkeypatch):
    """A shard that kills its worker, or its reader, is given up on with its reason; every other shard is done."""
    test_executors.test_poison_shards_are_quarantined(cluster, RAY_DATA, corpus, tmp_path, monkeypatch)

"""Candidates joined with a corpus that is larger than what a process may hold. Run by `make scale`."""

import random
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.cli.options import configure
from lib.reranking.config import RerankConfig
from lib.reranking.job import rerank
from tests.scale.memory import memory_watched
from tests.support import tiny

PASSAGES, QUERIES, CANDIDATES, FILES = 1_000_000, 2_000, 10, 8
MOST_BYTES = 4 << 30
WORDS = 80  # a passage, about 500 bytes


def test_a_million_passages_are_joined_within_4_gb(cluster, tmp_path):
    """20,000 candidates get their passages from a corpus of a million rows (half a GB of text), and their scores, while
    all processes together, Ray's own and the driver among them, take at most 4 GB. Each pair comes once, with its text."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(5000)]
    (tmp_path / "corpus").mkdir()
    for number in range(FILES):
        ids = range(number, PASSAGES, FILES)
        texts = [f"{i} " + " ".join(rng.choices(vocabulary, k=WORDS)) for i in ids]
        pq.write_table(
            pa.table({"id": [f"p{i}" for i in ids], "text": texts}), tmp_path / "corpus" / f"{number}.parquet"
        )
    queries = {"id": [f"q{q}" for q in range(QUERIES)], "text": [f"query {q}" for q in range(QUERIES)]}
    pq.write_table(pa.table(queries), tmp_path / "queries.parquet")
    pairs = [(f"q{q}", f"p{rng.randrange(PASSAGES)}") for q in range(QUERIES) for _ in range(CANDIDATES)]
    table = pa.table({"query_id": [q for q, _ in pairs], "passage_id": [p for _, p in pairs]})
    pq.write_table(table, tmp_path / "candidates.parquet")
    config = configure(
        RerankConfig,
        input=str(tmp_path / "candidates.parquet"),
        queries=str(tmp_path / "queries.parquet"),
        corpus=str(tmp_path / "corpus"),
        output=str(tmp_path / "out"),
        model=str(tiny.build_reranker("bert", tmp_path / "model")),
    )
    began = time.monotonic()
    with memory_watched() as seen:
        rerank(config)
    seconds = time.monotonic() - began

    rows = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "out").glob("part-*.parquet"))
    print(f"{seconds:.0f} s, {max(seen) / 2**30:.2f} GiB at most, of it {seen[0] / 2**30:.2f} before")
    assert sorted(zip(rows["query_id"].to_pylist(), rows["passage_id"].to_pylist(), strict=True)) == sorted(pairs)
    assert rows["error"].null_count == len(pairs)
    assert pc.min(rows["tokens"]).as_py() > WORDS
    assert max(seen) <= MOST_BYTES

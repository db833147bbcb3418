"""What people run today, written as they write it, and our encoder without its engine.

    python benchmarks/peers.py sentence-transformers CORPUS OUTPUT MODEL

CORPUS is a Parquet file with columns `id` and `text`. Each command prints one line of JSON; `work` in it is the seconds
from the first read to the last write, without imports and model loading.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq


@click.group()
def main() -> None:
    """The peers of the embed job, one a command."""


def arguments(command: Any) -> Any:
    """CORPUS OUTPUT MODEL, which every peer takes."""
    for name in ("model", "output", "corpus"):
        command = click.argument(name)(command)
    return command


@main.command()
@arguments
def sentence_transformers(corpus: str, output: str, model: str) -> None:
    """`encode` with its defaults, in one process with the threads that torch takes."""
    import torch
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model)
    began = time.perf_counter()
    table = pq.read_table(corpus)
    vectors = encoder.encode(table["text"].to_pylist())
    write(output, table["id"], vectors)
    say(work=time.perf_counter() - began, threads=torch.get_num_threads())


@main.command()
@arguments
@click.option("--actors", default=2)
@click.option("--threads", default=1, help="Of each actor.")
@click.option("--batch-size", default=1024)
def ray_data(corpus: str, output: str, model: str, actors: int, threads: int, batch_size: int) -> None:
    """read_parquet, map_batches with a class that holds a SentenceTransformer, write_parquet.

    The actors load their models inside the pipeline, so `work` runs from the first batch that a loaded actor takes.
    """
    import ray

    starts = Path(f"{output}.starts")
    starts.mkdir(parents=True)

    class Embedder:
        def __init__(self) -> None:
            import torch
            from sentence_transformers import SentenceTransformer

            torch.set_num_threads(threads)
            self.model = SentenceTransformer(model)
            self.start: float | None = None

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if self.start is None:
                self.start = time.time()
                (starts / str(os.getpid())).write_text(str(self.start))
            return {"id": batch["id"], "embedding": self.model.encode(batch["text"].tolist())}

    ray.init(address="local", log_to_driver=False)
    texts = ray.data.read_parquet(corpus)
    # One core is left to the tasks that read and write: where actors take all of them, Ray Data waits for ever.
    cpus = max(1, actors * threads - 1) / actors
    embedded = texts.map_batches(Embedder, batch_size=batch_size, concurrency=actors, num_cpus=cpus)
    embedded.write_parquet(output)
    ended = time.time()
    say(work=ended - min(float(file.read_text()) for file in starts.iterdir()), threads=threads)


@main.command()
@arguments
@click.option("--dtype", default="float32")
@click.option("--processes", default=2)
@click.option("--shard-rows", default=1250)
def encoder_loop(corpus: str, output: str, model: str, dtype: str, processes: int, shard_rows: int) -> None:
    """Our Tokenizer and Encoder over the same shards, processes of one thread. `work` begins when all have loaded."""
    Path(output).mkdir(parents=True)
    rows = pq.read_metadata(corpus).num_rows
    shards = [(corpus, output, start, shard_rows) for start in range(0, rows, shard_rows)]
    context = multiprocessing.get_context("spawn")
    loaded = context.Barrier(processes + 1)
    with context.Pool(processes, load, (model, dtype, loaded)) as pool:
        loaded.wait()
        began = time.perf_counter()
        pool.map(encode, shards, chunksize=1)
        say(work=time.perf_counter() - began, threads=1)


held: dict[str, Any] = {}  # tokenizer and encoder of one process of the encoder loop


def load(model: str, dtype: str, loaded: Any) -> None:
    from lib.models.encoder import Encoder
    from lib.models.spec_reader import read_spec
    from lib.models.tokenizer import Tokenizer

    spec = read_spec(model)
    held.update(tokenizer=Tokenizer(spec), encoder=Encoder(spec, dtype=dtype, device="cpu", threads=1))
    loaded.wait()


def encode(shard: tuple[str, str, int, int]) -> None:
    corpus, output, start, rows = shard
    table = pq.read_table(corpus).slice(start, rows)
    vectors = held["encoder"].encode(held["tokenizer"](table["text"].to_pylist()))
    write(f"{output}/part-{start:09}.parquet", table["id"], vectors)


def write(path: str, ids: pa.ChunkedArray, vectors: Any) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({"id": ids, "embedding": column}), path)


def say(**facts: float) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()

"""An index as it is built without a cluster: faiss in one process, on one thread, of a folder of Parquet files.

    python benchmarks/index_script.py FOLDER INDEX KEY METRIC SAMPLE_ROWS ITERATIONS CODEBOOK_ITERATIONS

Prints one line of JSON with the seconds by step. The sample lies evenly over all rows.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

METRICS = {"cosine": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


def read(path: Path) -> np.ndarray:
    """float32 [n, dim]."""
    vectors = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(vectors), -1)


def sample(files: list[Path], firsts: np.ndarray, count: int) -> np.ndarray:
    """float32 [count, dim], evenly over all rows."""
    taken = np.linspace(0, firsts[-1] - 1, min(count, firsts[-1])).round().astype(np.int64)
    rows = [taken[(taken >= first) & (taken < stop)] - first for first, stop in pairwise(firsts)]
    return np.concatenate([read(file)[mine] for file, mine in zip(files, rows, strict=True)])


def main(
    folder: str, output: str, key: str, metric: str, sample_rows: str, iterations: str, codebook_iterations: str
) -> None:
    faiss.omp_set_num_threads(1)
    pa.set_cpu_count(1)
    clock = [time.perf_counter()]
    files = sorted(Path(folder).glob("*.parquet"))
    firsts = np.cumsum([0, *(pq.read_metadata(file).num_rows for file in files)])
    vectors = sample(files, firsts, int(sample_rows))
    clock.append(time.perf_counter())
    index = faiss.index_factory(vectors.shape[1], key, METRICS[metric])
    inner = faiss.downcast_index(faiss.extract_index_ivf(index))
    inner.cp.niter = int(iterations)
    if hasattr(inner, "pq"):
        inner.pq.cp.niter = int(codebook_iterations)
    index.train(vectors)
    del vectors
    clock.append(time.perf_counter())
    for file, first in zip(files, firsts, strict=False):
        vectors = read(file)
        index.add_with_ids(vectors, np.arange(first, first + len(vectors)))
    clock.append(time.perf_counter())
    faiss.write_index(index, output)
    clock.append(time.perf_counter())
    steps = np.diff(clock).tolist()
    print(json.dumps(dict(zip(("sample", "train", "add", "write"), steps, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])

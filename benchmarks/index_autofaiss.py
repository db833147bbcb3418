"""autofaiss's index of the same Parquet files, run by the Python of its own environment: it wants numpy below 2.

    AUTOFAISS_VENV/bin/python benchmarks/index_autofaiss.py FOLDER INDEX KEY METRIC CORES INDEX_MEMORY MEMORY

Prints one line of JSON with the seconds and the versions. The key and a number of probes are given, so that it tunes nothing.
"""

import json
import sys
import time
from importlib.metadata import version

import autofaiss


def main(folder: str, output: str, key: str, metric: str, cores: str, index_memory: str, memory: str) -> None:
    began = time.perf_counter()
    autofaiss.build_index(
        folder,
        file_format="parquet",
        embedding_column_name="embedding",
        index_path=output,
        index_infos_path=f"{output}.json",
        index_key=key,
        index_param="nprobe=16",
        metric_type=metric,
        nb_cores=int(cores),
        max_index_memory_usage=index_memory,
        current_memory_available=memory,
    )
    versions = {name: version(name) for name in ("autofaiss", "faiss-cpu", "numpy", "pyarrow")}
    print(json.dumps({"build": time.perf_counter() - began, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])

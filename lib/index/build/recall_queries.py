"""The queries that recall is measured with: vectors held out of the sample, or those of --queries."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...data.corpus import list_files, measure
from ...data.shards import cut_shards, sample_shards
from ...engine.parts import FOOTER_THREADS, read_manifest
from ...errors import InputError
from ...storage.filesystem import open_file
from ...storage.fingerprint import fingerprint
from ...storage.listing import InputFile
from .config import IndexBuild
from .layout import FILE, HELD, NUMBER, ROW, VECTOR
from .stage_parts import column, matrix
from .train_job import draw, source
from .vector_source import VectorOptions, Vectors, describe

BLOCKS = 32  # of a file of queries, evenly over it
BUFFER = 1 << 16  # bytes: of a part of the sample few are read


def check_queries(build: IndexBuild) -> None:
    """Read what is asked for of --queries, before anything is computed. Raises InputError for vectors of another model, or none."""
    if build.config.queries and not len(_given(build)):
        raise InputError(
            f"--queries {build.config.queries}: of the rows that were read none has a vector of finite numbers. Look at its column "
            f"{build.config.vector_column!r}, or leave --queries out"
        )


def fixed(build: IndexBuild) -> str:
    """What names these queries: the files of --queries, or nothing."""
    return fingerprint([(f.path, f.size, f.tag) for f in _files(build)]) if build.config.queries else ""


def queries_of(build: IndexBuild, plan: pa.Table) -> pa.Table:
    """VECTOR and NUMBER of those that are asked for. plan: of the encoded rows."""
    if build.config.queries:
        vectors = _given(build)
        numbers = np.full(len(vectors), -1, np.int64)
    else:
        folder = build.stage("sample")
        parts = read_manifest(folder) or draw(build)
        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            held = pa.concat_tables(threads.map(lambda part: _held(folder.path(part.part), build.storage), parts))
        numbers = _numbers(plan, held[FILE].to_pylist(), held[ROW].to_numpy())
        vectors = matrix(held[VECTOR])
        vectors, numbers = vectors[numbers >= 0], numbers[numbers >= 0]
    most = build.config.recall_queries
    kept = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).round().astype(np.int64)
    return pa.table({VECTOR: column(vectors[kept]), NUMBER: numbers[kept]})


def _held(path: str, storage: Mapping[str, Any]) -> pa.Table:
    """The rows of a part of the sample that are held out: a row group of their own, of the two that there can be."""
    columns = [VECTOR, FILE, ROW, HELD]
    with open_file(path, storage, BUFFER) as file, pq.ParquetFile(file) as parquet:
        first = parquet.read_row_groups([0] if parquet.num_row_groups else [], columns=columns)
    return first.filter(first[HELD])


def _options(build: IndexBuild) -> VectorOptions:
    url = str(build.config.queries)
    return VectorOptions(
        input=url,
        output=url,
        keep_columns=(build.config.vector_column,),
        storage_option=build.config.storage_option,
    )


def _files(build: IndexBuild) -> list[InputFile]:
    return list_files(_options(build), build.storage)


def _described(build: IndexBuild, files: Sequence[InputFile]) -> Vectors:
    about = describe(files, build.config.vector_column, build.storage)
    differing = [name for name in ("model", "revision", "dim") if about.made.get(name) != build.vectors.made.get(name)]
    if about.dim != build.vectors.dim or (about.made and build.vectors.made and differing):
        raise InputError(
            f"--queries {build.config.queries}: vectors of {about.made.get('model')} in {about.dim} dimensions, the index's are "
            f"of {build.vectors.made.get('model')} in {build.vectors.dim}. Embed the queries with the same model"
        )
    return about


def _given(build: IndexBuild) -> np.ndarray:
    """Vectors of --queries, evenly over the first rows of blocks of it, read as their own files say."""
    files = _files(build)
    about = _described(build, files)
    corpus = measure(files, _options(build), build.storage, strict=True)
    each = -(-build.config.recall_queries // BLOCKS)
    blocks = sample_shards(cut_shards(corpus, max(each, int(corpus.rows // BLOCKS))), BLOCKS, each)
    read = replace(source(build, corpus.schema), id_column=None, reasons=about.reasons, ranges=about.ranges).read
    found = [rows.vectors[rows.good] for rows in map(read, blocks)]
    return np.concatenate(found) if found else np.empty((0, build.vectors.dim), np.float32)


def _numbers(plan: pa.Table, files: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """int64 [n]: what the index calls rows of files; -1 for those that are in no plan."""
    counts = plan["rows"].to_numpy()
    firsts = np.cumsum(counts) - counts
    starts: dict[str, list[tuple[int, int, int]]] = {}
    for path, start, stop, first in zip(
        plan["path"].to_pylist(), plan["start"].to_pylist(), plan["stop"].to_pylist(), firsts.tolist(), strict=True
    ):
        starts.setdefault(path, []).append((start, stop, first))
    found = np.full(len(rows), -1, np.int64)
    for place, (file, row) in enumerate(zip(files, rows.tolist(), strict=True)):
        for start, stop, first in starts.get(file, []):
            if start <= row < stop:
                found[place] = first + row - start
    return found

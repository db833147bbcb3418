"""The queries that recall is measured with: vectors held out of the sample, or those of --queries."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.corpus import list_files, measure
from ...data.shards import cut_shards, sample_shards
from ...data.vectors import as_matrix
from ...engine.parts import read_manifest
from ...errors import InputError
from ...storage.fingerprint import fingerprint
from .config import IndexBuild
from .layout import FILE, HELD_OUT, NUMBER, ROW, VECTOR
from .recall import NO_ROW
from .stage_parts import binary_column, read_row_groups
from .train_job import sample
from .vector_source import VectorFormat, VectorOptions, describe

BLOCKS = 32  # of a file of queries, evenly over it


def check_queries(build: IndexBuild) -> None:
    """Read the vectors of --queries. Raises InputError for vectors of another model, or none."""
    if build.config.queries and not len(_read_queries(build)):
        raise InputError(
            f"--queries {build.config.queries}: of the rows that were read none has a vector of finite numbers. Look at its column "
            f"{build.config.vectors.vector_column!r}, or leave --queries out"
        )


def fixed(build: IndexBuild) -> str:
    """A fingerprint of the files of --queries; "" without them."""
    if not build.config.queries:
        return ""
    return fingerprint([(f.path, f.size, f.tag) for f in list_files(_options(build), build.storage)])


def queries_of(build: IndexBuild, plan: pa.Table) -> pa.Table:
    """VECTOR and NUMBER of the queries. plan: of the encoded rows."""
    if build.config.queries:
        vectors = _read_queries(build)
        numbers = np.full(len(vectors), NO_ROW, np.int64)
    else:
        vectors, numbers = _held_out(build, plan)
    most = build.config.recall_queries
    kept = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).round().astype(np.int64)
    return pa.table({VECTOR: binary_column(vectors[kept]), NUMBER: numbers[kept]})


def _held_out(build: IndexBuild, plan: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The held-out vectors that are in the plan, float32 [n, dim], and their numbers in the index, int64 [n]."""
    folder = build.stage("sample")
    parts = read_manifest(folder) or sample(build)
    paths = [folder.path(part.part) for part in parts]
    # Held-out rows are in the first row groups.
    table = read_row_groups(paths, 0, [VECTOR, FILE, ROW, HELD_OUT], pc.field(HELD_OUT), build.storage)
    numbers = _numbers(plan, table[FILE].to_pylist(), table[ROW].to_numpy())
    planned = numbers != NO_ROW
    return as_matrix(table[VECTOR], np.float32)[planned], numbers[planned]


def _options(build: IndexBuild) -> VectorOptions:
    return VectorOptions(input=str(build.config.queries), vector_column=build.config.vectors.vector_column)


def _refuse_other_model(build: IndexBuild, format: VectorFormat) -> None:
    """Raise InputError for queries that cannot be compared with the index's vectors."""
    own, other = build.format.encoder, format.encoder
    differing = [name for name in ("model", "revision", "dim") if other.get(name) != own.get(name)]
    if format.dim != build.format.dim or (other and own and differing):
        raise InputError(
            f"--queries {build.config.queries}: vectors of {other.get('model')} in {format.dim} dimensions, the index's are "
            f"of {own.get('model')} in {build.format.dim}. Embed the queries with the same model"
        )


def _read_queries(build: IndexBuild) -> np.ndarray:
    """Vectors of --queries, from the beginnings of blocks spread evenly over it."""
    options = _options(build)
    files = list_files(options, build.storage)
    format = describe(files, options.vector_column, build.storage)
    _refuse_other_model(build, format)
    corpus = measure(files, options, build.storage, strict=True)
    each = -(-build.config.recall_queries // BLOCKS)
    blocks = sample_shards(cut_shards(corpus, max(each, int(corpus.rows // BLOCKS))), BLOCKS, each)
    source = replace(build.source(corpus.schema), id_column=None, format=format)
    vectors = [source.read(block).valid_vectors for block in blocks]
    return np.concatenate(vectors) if vectors else np.empty((0, build.format.dim), np.float32)


def _numbers(plan: pa.Table, files: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """int64 [n]: the numbers in the index of rows of files; NO_ROW for rows that are in no plan."""
    ranges: dict[str, list[tuple[int, int, int]]] = {}
    first = 0
    for each in plan.select(["path", "start", "stop", "rows"]).to_pylist():
        ranges.setdefault(each["path"], []).append((each["start"], each["stop"], first))
        first += each["rows"]
    numbers = np.full(len(rows), NO_ROW, np.int64)
    for place, (file, row) in enumerate(zip(files, rows.tolist(), strict=True)):
        for start, stop, first in ranges.get(file, []):
            if start <= row < stop:
                numbers[place] = first + row - start
    return numbers

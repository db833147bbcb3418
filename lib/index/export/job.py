"""The driver of `--exports`: files for other stores, beside the index.

OUTPUT/exports/centroids/             the lists' centroids, codebooks and rotation as .npy, and a README that says what they are
OUTPUT/exports/milvus/                Parquet, `id` and `vector`: the collection's fields must have these names
OUTPUT/exports/pinecone/__default__/  Parquet, `id`, `values`, `metadata`. Import the folder above: its folders are
                                      namespaces, and all Parquet in them is imported, so nothing else may lie there
OUTPUT/exports/vectors.lance/         a Lance dataset: `id`, the kept columns, `vector`

Each generation of the index is a run of its own: the rows that a grown corpus adds are exported, and exported files stay.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from ...data.shards import shards
from ...engine.mapper import FusedMapper
from ...engine.parts import Part, read_facts
from ...engine.run import read_plan
from ...errors import RunError
from ...storage.folder import Folder
from ...storage.scratch import Scratch
from ..build.codec import load_index, transforms_of
from ..build.config import IndexBuild
from ..build.layout import ROWS, TRAINED
from ..build.segments_job import read_manifest
from ..build.stage_parts import some_shards
from ..build.vector_source import VectorSource
from ..kinds import centroids_of, lists_of, uses_inner_product
from .mappers import ExportFiles, ExportFragments, file_name, lance_options, lance_schema, lance_url

log = logging.getLogger("shoal")

EXPORTED, README = "exports", "README.md"
CENTROIDS, CODEBOOKS, ROTATION = "centroids", "codebooks", "rotation"


@dataclass(frozen=True)
class Store:
    """A store that imports Parquet. place: its folder below EXPORTED. column, with_metadata: as in ExportFiles."""

    name: str
    place: str
    column: str
    with_metadata: bool


MILVUS = Store("milvus", "milvus", "vector", with_metadata=False)
PINECONE = Store("pinecone", "pinecone/__default__", "values", with_metadata=True)


def export(build: IndexBuild, parts: Sequence[Part]) -> None:
    """Write the exports of --exports that are missing. parts: of the encoded rows, all of which the manifest has.

    Raises RunError where exported files are missing.
    """
    exports, vectors = build.config.exports, sum(part.rows - part.errors for part in parts)
    if "centroids" in exports:
        _export_centroids(build)
    for store in (MILVUS, PINECONE):
        if store.name in exports:
            _export_files(build, store, vectors)
    if "lance" in exports:
        _export_lance(build, vectors)


@dataclass(frozen=True)
class ExportRun:
    """The export of a generation. first: the index's number of its first shard; plan: its shards, numbered from 0."""

    first: int
    plan: pa.Table
    folder: Folder
    parts: Sequence[Part]


def _run_exports(build: IndexBuild, name: str, mapper: Callable[[VectorSource, int], FusedMapper]) -> list[ExportRun]:
    """Export each generation; a run of each. mapper: from a source and the `first` of ExportRun."""
    plan, columns = read_plan(build.folder.below(ROWS))
    source = build.source(columns, build.config.vectors.keep_columns)

    def run_export(first: int, stop: int) -> ExportRun:
        shards, exporter = some_shards(plan, first, stop), mapper(source, first)
        folder, label = build.stage(f"export-{name}-{first:06d}-{stop:06d}"), f"exporting for {name}"
        settings = {"job": "export", "to": name, "shards": [first, stop]}
        parts = build.run_stage(folder, label, lambda run, workers: exporter, shards, settings, columns=columns)
        return ExportRun(first, shards, folder, parts)

    return [run_export(*generation["shards"]) for generation in read_manifest(build)["generations"]]


def _export_files(build: IndexBuild, store: Store, vectors: int) -> None:
    """Export Parquet for a store. vectors: of the index."""
    place = build.folder.below(f"{EXPORTED}/{store.place}")
    with_metadata = store.with_metadata and bool(build.config.vectors.keep_columns)
    runs = _run_exports(
        build, store.name, lambda source, first: ExportFiles(source, place, first, store.column, with_metadata)
    )
    existing, count = place.list(), 0
    for run in runs:
        with_parts = zip(shards(run.plan), run.parts, strict=True)
        names = [file_name(run.first, shard) for shard, part in with_parts if part.source_rows > part.errors]
        _refuse_lost(place, run, [name for name in names if name not in existing])
        count += len(names)
    log.info(f"{place.url}: {vectors:,} vectors in {count:,} files{_left_out(place, runs, vectors)}")


def _export_lance(build: IndexBuild, vectors: int) -> None:
    """Export a Lance dataset. Its commit names every fragment, so a repeated one has the same rows, each once."""
    import lance

    place = build.folder.below(f"{EXPORTED}/vectors.lance")
    url, options = lance_url(place), lance_options(place)
    runs = _run_exports(build, "lance", lambda source, first: ExportFragments(source, url, options))
    existing, fragments = place.below("data").list(), []
    for run in runs:
        of_run = [each for fact in read_facts(run.folder, run.parts) for each in fact["fragments"]]
        _refuse_lost(place, run, [name for name in _paths(of_run) if name not in existing])
        fragments += of_run
    left_out = _left_out(place, runs, vectors)
    if _committed(place, url, options) != _paths(fragments):
        columns = read_plan(build.folder.below(ROWS))[1]
        schema = lance_schema(build.source(columns, build.config.vectors.keep_columns))
        known = [lance.FragmentMetadata.from_json(json.dumps(fragment)) for fragment in fragments]
        lance.LanceDataset.commit(url, lance.LanceOperation.Overwrite(schema, known), storage_options=options)
    log.info(f"{place.url}: {vectors:,} vectors in {len(fragments):,} fragments{left_out}")


def _paths(fragments: Sequence[Mapping[str, Any]]) -> list[str]:
    return [file["path"] for fragment in fragments for file in fragment["files"]]


def _committed(place: Folder, url: str, options: dict[str, str]) -> list[str] | None:
    """Data files of the dataset's last version; None before the first one."""
    import lance

    if not place.below("_versions").list():
        return None
    dataset = lance.dataset(url, storage_options=options)
    return [file.path for fragment in dataset.get_fragments() for file in fragment.data_files()]


def _refuse_lost(place: Folder, run: ExportRun, lost: Sequence[str]) -> None:
    if lost:
        raise RunError(
            f"{len(lost)} files of {place.url} were exported and are gone, the first is {lost[0]}. Put them back; or delete "
            f"{run.folder.url} and start the same command again, which exports them anew"
        )


def _left_out(place: Folder, runs: Sequence[ExportRun], vectors: int) -> str:
    """A phrase about the rows that are not in an export. Raises RunError where it has not every vector of the index."""
    parts = [part for run in runs for part in run.parts]
    rows, without = sum(part.source_rows for part in parts), sum(part.errors for part in parts)
    if rows - without != vectors:
        raise RunError(
            f"{place.url} has {rows - without:,} vectors, the index {vectors:,}. Delete it and {runs[0].folder.url}, and start "
            "the same command again"
        )
    return f"; {without:,} rows without one are left out ({ROWS}/ says why)" if without else ""


def _export_centroids(build: IndexBuild) -> None:
    """Export once, the README last: the trained index never changes."""
    place = build.folder.below(f"{EXPORTED}/centroids")
    if place.exists(README):
        return
    index = load_index(build.folder.read(TRAINED))
    arrays = trained_arrays(index)
    with Scratch("export") as folder:
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
            place.put(f"{name}.npy", f"{folder}/{name}.npy")
    inner_product = uses_inner_product(build.kind, build.config.metric)
    place.publish(README, centroids_readme(arrays, inner_product, lists_of(index).by_residual).encode())
    log.info(f"{place.url}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")


def trained_arrays(index: Any) -> dict[str, np.ndarray]:
    """The arrays of a trained index with lists, float32: CENTROIDS [lists, dim]; ROTATION [dim, dim] and CODEBOOKS [groups,
    2 ** bits, dim / groups] where it has them."""
    inner = lists_of(index)
    arrays = {CENTROIDS: np.array(centroids_of(inner))}
    if isinstance(inner, faiss.IndexIVFPQ):
        pq = inner.pq
        arrays[CODEBOOKS] = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    for rotation in transforms_of(index):
        assert ROTATION not in arrays, "one matrix"
        assert not rotation.have_bias, "a rotation"
        arrays[ROTATION] = faiss.vector_to_array(rotation.A).reshape(rotation.d_out, rotation.d_in)
    return arrays


def centroids_readme(arrays: Mapping[str, np.ndarray], inner_product: bool, residual: bool) -> str:
    """The README beside the arrays, as Markdown. residual: codes are of a vector's difference from its centroid."""
    lists, dim = arrays[CENTROIDS].shape
    rotated = ROTATION in arrays
    vector = "`x @ rotation.T`" if rotated else "`x`"
    measure = "greatest inner product with" if inner_product else "least Euclidean distance from"
    paragraphs = [
        "# Centroids",
        f"`centroids.npy`: float32 [{lists}, {dim}], row i for list i; the column `list` of `rows/` names it.",
    ]
    if rotated:
        behind = f"Centroids lie behind it: a vector x is rotated first, {vector}."
        paragraphs.append(f"`rotation.npy`: float32 [{dim}, {dim}]. {behind}")
    paragraphs.append(f"The list of a vector x is that whose centroid has the {measure} {vector}.")
    if CODEBOOKS in arrays:
        groups, entries, width = arrays[CODEBOOKS].shape
        coded = f"{vector} less its list's centroid" if residual else vector
        paragraphs.append(
            f"`codebooks.npy`: float32 [{groups}, {entries}, {width}]. Of {coded}, group g is the {width} dimensions from "
            f"{width}g on; it is coded as the number of the nearest row of codebook g, in {entries.bit_length() - 1} bits. The "
            "column `code` holds these numbers one after the other, low bits first."
        )
    return "\n\n".join(paragraphs) + "\n"

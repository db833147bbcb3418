"""The driver of `--exports`: what other stores read, beside the index.

OUTPUT/exports/centroids/             the lists' centroids, codebooks and rotation as .npy, and a README that says what they are
OUTPUT/exports/milvus/                Parquet, `id` and `vector`: what the fields of the collection must be called
OUTPUT/exports/pinecone/__default__/  Parquet, `id`, `values`, `metadata`. Pinecone is given the folder above: its folders are
                                      namespaces, and all Parquet in them is imported, so nothing else may lie there
OUTPUT/exports/vectors.lance/         a Lance dataset: `id`, the kept columns, `vector`

Each generation of the index is a run of its own: what a grown corpus adds is exported, and what was exported stays.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ...data.shards import shards
from ...engine.job import Job, carry_out_planned, require_complete
from ...engine.mapper import Mapper
from ...engine.parts import Part
from ...engine.run import Run, read_plan
from ...engine.workers import WorkerPlan
from ...errors import RunError
from ...storage.folder import Folder
from ...storage.scratch import Scratch
from ..build.codec import load_index, transforms_of
from ..build.config import IndexBuild
from ..build.layout import ROWS, TRAINED
from ..build.segments_job import read_manifest
from ..build.stage_parts import facts_of, some_shards
from ..build.train_job import source
from ..build.vector_source import Source
from ..kinds import lists_of, uses_inner_product
from .mappers import ExportFiles, ExportFragments, file_name, lance_options, lance_schema, lance_url

log = logging.getLogger("shoal")

EXPORTED, README = "exports", "README.md"
CENTROIDS, CODEBOOKS, ROTATION = "centroids", "codebooks", "rotation"


@dataclass(frozen=True)
class Store:
    """One that imports Parquet. place: its folder below EXPORTED; column: what it calls a vector; described: as in Files."""

    name: str
    place: str
    column: str
    described: bool


MILVUS = Store("milvus", "milvus", "vector", described=False)
PINECONE = Store("pinecone", "pinecone/__default__", "values", described=True)


def export(build: IndexBuild, parts: Sequence[Part]) -> None:
    """Write what --exports asks for and is not there yet. parts: of the encoded rows, all of which the manifest has.

    Raises RunError where what was exported before is no longer there.
    """
    asked, vectors = build.config.exports, sum(part.rows - part.errors for part in parts)
    if "centroids" in asked:
        _centroids(build)
    for store in (MILVUS, PINECONE):
        if store.name in asked:
            _files(build, store, vectors)
    if "lance" in asked:
        _lance(build, vectors)


def _place(build: IndexBuild, name: str) -> Folder:
    return build.folder.below(f"{EXPORTED}/{name}")


@dataclass(frozen=True)
class ExportRun:
    """The export of a generation. first: the index's number of its first shard; plan: its shards, numbered from 0."""

    first: int
    plan: pa.Table
    folder: Folder
    parts: Sequence[Part]


def _runs(build: IndexBuild, name: str, verb: Callable[[Source, int], Mapper]) -> list[ExportRun]:
    """One for each generation, every shard of it done. verb: of how the vectors are read, and of ExportRun's `first`."""
    plan, columns = read_plan(build.folder.below(ROWS))
    return [
        _run(build, name, generation["shards"], (plan, columns), verb)
        for generation in read_manifest(build)["generations"]
    ]


def _run(
    build: IndexBuild,
    name: str,
    between: tuple[int, int],
    rows: tuple[pa.Table, pa.Schema],
    verb: Callable[[Source, int], Mapper],
) -> ExportRun:
    """between: the first of its shards, and the one after its last. rows: plan and columns of all."""
    (first, stop), (plan, columns) = between, rows
    own = some_shards(plan, first, stop)

    def made(ledger: Run, workers: WorkerPlan) -> Mapper:
        return verb(source(build, ledger.columns, build.config.keep_columns), first)

    folder = build.stage(f"export-{name}-{first:06d}-{stop:06d}")
    job = Job(f"exporting for {name}", {"verb": "export", "to": name, "of": build.key, "shards": [first, stop]}, made)
    options = build.options(build.config.input, folder)
    outcome = require_complete(carry_out_planned(job, options, lambda: (own, columns)), folder.url)
    return ExportRun(first, own, folder, outcome.parts)


def _files(build: IndexBuild, store: Store, vectors: int) -> None:
    """What a store imports. vectors: how many the index has."""
    place, kept = _place(build, store.place), bool(build.config.keep_columns)

    def verb(source: Source, first: int) -> ExportFiles:
        return ExportFiles(source, place, first, store.column, store.described and kept)

    runs, files = _runs(build, store.name, verb), 0
    there = place.list()
    for run in runs:
        told = zip(shards(run.plan), run.parts, strict=True)
        names = [file_name(run.first, shard) for shard, part in told if part.source_rows > part.errors]
        _refuse_gone(place, run, [name for name in names if name not in there])
        files += len(names)
    log.info(f"{place.url}: {vectors:,} vectors in {files:,} files{_left_out(place, runs, vectors)}")


def _lance(build: IndexBuild, vectors: int) -> None:
    """One dataset. Its commit names every fragment there is, so a repeated one has the same rows, and none of them twice."""
    import lance

    place = _place(build, "vectors.lance")
    url, options = lance_url(place), lance_options(place)
    runs = _runs(build, "lance", lambda source, first: ExportFragments(source, url, options))
    there, made = place.below("data").list(), []
    for run in runs:
        fragments = [each for fact in facts_of(run.folder, run.parts) for each in fact["fragments"]]
        _refuse_gone(place, run, [name for name in _paths(fragments) if name not in there])
        made += fragments
    left_out = _left_out(place, runs, vectors)
    if _committed(place, url, options) != _paths(made):
        schema = lance_schema(source(build, read_plan(build.folder.below(ROWS))[1], build.config.keep_columns))
        known = [lance.FragmentMetadata.from_json(json.dumps(fragment)) for fragment in made]
        lance.LanceDataset.commit(url, lance.LanceOperation.Overwrite(schema, known), storage_options=options)
    log.info(f"{place.url}: {vectors:,} vectors in {len(made):,} fragments{left_out}")


def _paths(fragments: Sequence[Mapping[str, Any]]) -> list[str]:
    return [file["path"] for fragment in fragments for file in fragment["files"]]


def _committed(place: Folder, url: str, options: dict[str, str]) -> list[str] | None:
    """Data files of the dataset's last version; None while it has none."""
    import lance

    if not place.below("_versions").list():
        return None
    dataset = lance.dataset(url, storage_options=options)
    return [file.path for fragment in dataset.get_fragments() for file in fragment.data_files()]


def _refuse_gone(place: Folder, run: ExportRun, gone: Sequence[str]) -> None:
    if gone:
        raise RunError(
            f"{len(gone)} files of {place.url} were exported and are gone, the first is {gone[0]}. Put them back; or delete "
            f"{run.folder.url} and start the same command again, which exports them anew"
        )


def _left_out(place: Folder, runs: Sequence[ExportRun], vectors: int) -> str:
    """The rows that are not in an export, in words. Raises RunError where it has not every vector of the index."""
    rows, without = (
        sum(getattr(part, name) for run in runs for part in run.parts) for name in ("source_rows", "errors")
    )
    if rows - without != vectors:
        raise RunError(
            f"{place.url} has {rows - without:,} vectors, the index {vectors:,}. Delete it and {runs[0].folder.url}, and start "
            "the same command again"
        )
    return f"; {without:,} rows without one are left out ({ROWS}/ says why)" if without else ""


def _centroids(build: IndexBuild) -> None:
    """Published once, the README last: what is trained never changes."""
    place = _place(build, "centroids")
    if place.exists(README):
        return
    index = load_index(build.folder.read(TRAINED))
    arrays = trained_arrays(index)
    with Scratch("export") as folder:
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
            place.put(f"{name}.npy", f"{folder}/{name}.npy")
    place.publish(
        README,
        explained(arrays, uses_inner_product(build.kind, build.config.metric), lists_of(index).by_residual).encode(),
    )
    log.info(f"{place.url}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")


def trained_arrays(index: Any) -> dict[str, np.ndarray]:
    """Of a trained index with lists, float32: CENTROIDS [lists, dim]; ROTATION [dim, dim] and CODEBOOKS [groups, 2 ** bits,
    dim / groups] where it has them."""
    import faiss

    inner = lists_of(index)
    arrays = {CENTROIDS: faiss.downcast_index(inner.quantizer).reconstruct_n(0, inner.nlist)}
    if isinstance(inner, faiss.IndexIVFPQ):
        pq = inner.pq
        arrays[CODEBOOKS] = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
    for turn in transforms_of(index):
        assert ROTATION not in arrays, "one matrix"
        assert not turn.have_bias, "a rotation"
        arrays[ROTATION] = faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in)
    return arrays


def explained(arrays: Mapping[str, np.ndarray], products: bool, residual: bool) -> str:
    """The README beside them, as Markdown. residual: whether codes are of what a vector has beside its centroid."""
    lists, dim = arrays[CENTROIDS].shape
    turned = ROTATION in arrays
    vector = "`x @ rotation.T`" if turned else "`x`"
    measure = "greatest inner product with" if products else "least Euclidean distance from"
    said = [
        "# Centroids",
        f"`centroids.npy`: float32 [{lists}, {dim}], row i for list i; the column `list` of `rows/` names it.",
    ]
    if turned:
        said.append(
            f"`rotation.npy`: float32 [{dim}, {dim}]. Centroids live behind it: a vector x is turned first, {vector}."
        )
    said.append(f"The list of a vector x is that whose centroid has the {measure} {vector}.")
    if CODEBOOKS in arrays:
        groups, entries, width = arrays[CODEBOOKS].shape
        coded = f"{vector} less its list's centroid" if residual else vector
        said.append(
            f"`codebooks.npy`: float32 [{groups}, {entries}, {width}]. Of {coded}, group g is the {width} dimensions from "
            f"{width}g on; it is coded as the number of the nearest row of codebook g, in {entries.bit_length() - 1} bits. The "
            "column `code` holds these numbers one after the other, low bits first."
        )
    return "\n\n".join(said) + "\n"

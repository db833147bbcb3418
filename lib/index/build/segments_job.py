"""The driver of a build's second half: rows are encoded, new rows become segments, and the manifest names those.

    {"generations": [{"shards": [first, stop], "rows", "vectors", "error", "segments": [{"name", "first", "rows", ...}]}], "merged"}

A generation is the rows that one command added: the shards that were new to it. The names of its stages and segments are fixed by its
parts, so a command that was stopped resumes them.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from ...data.corpus import Corpus
from ...engine.job import even_rows
from ...engine.parts import Part, read_facts
from ...engine.parts import read_manifest as read_parts_manifest
from ...engine.planner import CorpusPlanner
from ...engine.run import Run
from ...engine.stage_files import StageFile, files_of, files_plan
from ...engine.workers import WorkerPlan, WorkerRequest
from ...errors import RunError
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..kinds import lists_of, to_spec
from .codec import EncodeMapper, load_index
from .config import IndexBuild
from .layout import MANIFEST, MERGED, ROWS, SEGMENTS, TRAINED
from .segments import BuildSegment, MergeSegments, group_parts, merge_memory, segment_memory
from .stage_parts import group_neighbours
from .vector_source import SHARD_BYTES

log = logging.getLogger("shoal")

Manifest = dict[str, Any]


def encode(build: IndexBuild) -> list[Part]:
    """The parts of all rows, those of new files last."""
    trained, options = build.folder.read(TRAINED), build.config.vectors

    def mapper(run: Run, workers: WorkerPlan) -> EncodeMapper:
        source = build.source(run.columns, options.keep_columns)
        return EncodeMapper(source, build.kind, build.folder, workers.threads)

    planner = CorpusPlanner(
        replace(options, id_column=build.id_column),  # rows are named as in the first command
        build.storage,
        lambda corpus, workers: encode_shard_rows(corpus, workers, build.format.dim),
        WorkerRequest(build.workers, weight_bytes=2 * len(trained)),
        strict=True,
    )
    settings = {"job": "encode", "trained": hashlib.sha256(trained).hexdigest()[:12]}
    return build.run_planned(build.folder.below(ROWS), f"encoding as {to_spec(build.kind)}", mapper, planner, settings)


def encode_shard_rows(corpus: Corpus, workers: int, dim: int) -> int:
    """Rows a shard by default. workers: the most that there can be."""
    return even_rows(corpus, workers, most=max(1, SHARD_BYTES // (4 * dim)))


def read_manifest(build: IndexBuild) -> Manifest:
    """The files that the index has so far."""
    return build.folder.read_json(MANIFEST) or {"generations": [], "merged": []}


def add(build: IndexBuild, parts: Sequence[Part]) -> Manifest:
    """Build segments of the rows that no generation has, and the manifest with them."""
    manifest = read_manifest(build)
    done = manifest["generations"][-1]["shards"][1] if manifest["generations"] else 0
    _rebuild_lost_segments(build, manifest, parts)
    if not parts[done:]:
        return manifest
    if manifest["merged"] and not build.config.merge:
        log.warning(
            f"warning: {build.folder.below(MERGED).url} holds what there was before. With --merge it is made anew"
        )
    manifest = {"generations": [*manifest["generations"], _new_generation(build, parts, done)], "merged": []}
    if read_manifest(build)["generations"] != manifest["generations"][:-1]:
        raise RunError(f"another command added to {build.folder.url} meanwhile. Start this one again: it resumes there")
    build.folder.publish(MANIFEST, json.dumps(manifest, indent=1).encode())
    _keep_only(build.folder.below(SEGMENTS), {segment["name"] for segment in segments_of(manifest)})
    build.folder.sweep(done={TRAINED, MANIFEST})
    return manifest


def _new_generation(build: IndexBuild, parts: Sequence[Part], done: int) -> dict[str, Any]:
    """Build the segments of the parts from number `done` on."""
    new, first = parts[done:], sum(part.rows for part in parts[:done])
    facts = read_facts(build.folder.below(ROWS), new)
    # An addition becomes as few segments as possible: each repeats the centroids.
    merged = 1 if done else build.config.merge or 1
    groups = group_parts(new, build.row_bytes, len(build.folder.read(TRAINED)), merged)
    vectors = sum(fact["vectors"] for fact in facts)
    return {
        "shards": [done, len(parts)],
        "rows": sum(part.rows for part in new),
        "vectors": vectors,
        "error": sum(fact["error"] * fact["vectors"] for fact in facts) / max(vectors, 1),
        "segments": _build_segments(build, groups, first),
    }


def _rebuild_lost_segments(build: IndexBuild, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Build segments of the manifest that are missing, or not complete, again from the same rows."""
    folder = build.folder.below(SEGMENTS)
    sizes = folder.list()
    for generation in manifest["generations"]:
        segments = generation["segments"]
        lost = [segment["name"] for segment in segments if sizes.get(segment["name"]) != segment["bytes"]]
        if not lost:
            continue
        log.warning(f"warning: {len(lost)} segments of {folder.url} are gone, {lost[0]} the first: they are made again")
        its_parts = parts[slice(*generation["shards"])]
        ends = np.cumsum([segment["rows"] for segment in segments])
        places = np.searchsorted(ends, np.cumsum([part.rows for part in its_parts]))
        _build_segments(build, group_neighbours(its_parts, places), segments[0]["first"], again=True)


def _keep_only(folder: Folder, names: set[str]) -> None:
    """Remove the files that no manifest names: of a command that was stopped, or of an earlier index."""
    for stale in folder.list().keys() - names:
        folder.remove(stale)
    folder.sweep(done=names)


def _build_segments(
    build: IndexBuild, groups: Sequence[Sequence[Part]], first: int, again: bool = False
) -> list[dict[str, Any]]:
    """The facts of new segments, one of each group of parts. again: build those too that were built before."""
    rows, segments = build.folder.below(ROWS), build.folder.below(SEGMENTS)
    firsts = tuple(accumulate((sum(part.rows for part in group) for group in groups), initial=first))
    key = fingerprint(build.key, [[part.part for part in group] for group in groups])
    names = tuple(f"segment-{start:012d}-{key}.faiss" for start in firsts[:-1])
    folder = build.stage("segments", key)
    if again:
        folder.remove_all()
    largest = max(np.diff(firsts)) * build.row_bytes
    parts = build.run_stage(
        folder,
        f"filling {len(groups)} segments",
        lambda run, workers: BuildSegment(build.kind, build.folder, segments, names, firsts, workers.threads),
        files_plan([files_of(rows, group) for group in groups]),
        {"job": "segments", "names": list(names)},
        weight_bytes=segment_memory(largest, build.folder.list(TRAINED)[TRAINED]),
    )
    return read_facts(folder, parts)


def segments_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [segment for generation in manifest["generations"] for segment in generation["segments"]]


def segment_files(index: Folder, segments: Sequence[Mapping[str, Any]]) -> list[StageFile]:
    """The files of segments of a manifest. index: its folder."""
    folder = index.below(SEGMENTS)
    return [StageFile(folder.path(segment["name"]), segment["vectors"], segment["bytes"]) for segment in segments]


def merge(build: IndexBuild, manifest: Manifest, count: int) -> Manifest:
    """Merge the segments on disk into `count` indexes of about as many vectors, or into one a segment if these are fewer."""
    target, segments = build.folder.below(MERGED), segments_of(manifest)
    groups = balance(segments, count)
    key = fingerprint(build.key, [[segment["name"] for segment in group] for group in groups])
    names = tuple(f"merged-{number:03d}-{key}.faiss" for number in range(len(groups)))
    if len(groups) < count:
        log.info(
            f"--merge {count}: {len(groups)} are made, of {len(segments)} segments. For more choose a new --output and fewer "
            "--shard-rows"
        )
    if [merged["name"] for merged in manifest["merged"]] == list(names) and _complete(target, manifest["merged"]):
        return manifest
    folder = build.stage("merge", key)
    if (before := read_parts_manifest(folder)) and not _complete(target, read_facts(folder, before)):
        folder.remove_all()  # another --merge has removed these files since
    parts = build.run_stage(
        folder,
        f"merging on disk into {len(groups)}",
        lambda run, workers: MergeSegments(build.folder, target, names),
        files_plan([segment_files(build.folder, group) for group in groups]),
        {"job": "merge", "names": list(names)},
        weight_bytes=merge_memory(build.folder.list(TRAINED)[TRAINED], lists_in(build), max(map(len, groups))),
    )
    manifest = manifest | {"merged": read_facts(folder, parts)}
    build.folder.publish(MANIFEST, json.dumps(manifest, indent=1).encode())
    _keep_only(target, {file["name"] for merged in manifest["merged"] for file in merged["files"]})
    return manifest


def _complete(folder: Folder, merged: Sequence[dict[str, Any]]) -> bool:
    """Whether every file of the merged indexes exists in its full size."""
    sizes = folder.list()
    return all(sizes.get(file["name"]) == file["bytes"] for each in merged for file in each["files"])


def balance(segments: Sequence[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Neighbouring segments in `count` groups of about as many vectors; fewer groups where there are fewer segments."""
    vectors = np.array([segment["vectors"] for segment in segments])
    middles = np.cumsum(vectors) - vectors / 2
    places = (middles * count / max(vectors.sum(), 1)).astype(np.int64)
    return group_neighbours(segments, np.minimum(places, count - 1))


def lists_in(build: IndexBuild) -> int:
    """Inverted lists of the trained index: those of the plan, or fewer where the sample had too few vectors."""
    return lists_of(load_index(build.folder.read(TRAINED))).nlist if build.kind.has_lists else 0

"""The driver of a build's second half: rows are encoded, what is new of them becomes pieces, and the manifest names those.

    {"generations": [{"shards": [first, stop], "rows", "vectors", "error", "pieces": [{"name", "first", "rows", ...}]}], "merged"}

A generation is what one command added: the shards that were new to it. Its folders are named after them, so a command that was
stopped finds its own again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.corpus import Corpus
from ...engine.job import Job, carry_out, carry_out_planned, even_rows, require_complete
from ...engine.parts import Part
from ...engine.parts import read_manifest as read_parts_manifest
from ...engine.run import Run
from ...engine.workers import WorkerPlan
from ...errors import RunError
from ...storage.fingerprint import fingerprint
from ...storage.folder import Folder
from ..kinds import ID_BYTES, lists_of, to_spec
from .codec import load_index
from .config import IndexBuild, corpus_options
from .encode import EncodeMapper
from .layout import MANIFEST, MERGED, ROWS, SEGMENTS, TRAINED
from .segments import LIST_BYTES, BuildSegment, MergeSegments, grouped
from .stage_parts import File, facts_of, files_of, files_plan
from .train_job import source
from .vector_source import SHARD_BYTES

log = logging.getLogger("shoal")

Manifest = dict[str, Any]


def encode(build: IndexBuild) -> list[Part]:
    """The parts of all rows there are, those of new files last."""
    folder, config = build.folder.below(ROWS), build.config
    trained = build.folder.read(TRAINED)
    fixed = hashlib.sha256(trained).hexdigest()[:12]

    def verb(ledger: Run, workers: WorkerPlan) -> EncodeMapper:
        return EncodeMapper(
            source(build, ledger.columns, config.keep_columns), build.kind, build.folder, workers.threads
        )

    def rows(corpus: Corpus, workers: int) -> int:
        return even_rows(corpus, workers, most=max(1, SHARD_BYTES // (4 * build.vectors.dim)))

    given = corpus_options(config)
    options = build.options(
        config.input,
        folder,
        id_column=build.id_column,
        keep_columns=given.keep_columns,
        limit=config.limit,
        shard_rows=config.shard_rows,
        strict=True,
    )
    settings = {"verb": "encode", "of": build.key, "trained": fixed}
    job = Job(f"encoding as {to_spec(build.kind)}", settings, verb, weight_bytes=2 * len(trained))
    return require_complete(carry_out(job, options, rows), folder.url).parts


def read_manifest(build: IndexBuild) -> Manifest:
    """What the index is made of so far."""
    try:
        return json.loads(build.folder.read(MANIFEST))
    except FileNotFoundError:
        return {"generations": [], "merged": []}


def add(build: IndexBuild, parts: Sequence[Part]) -> Manifest:
    """Make pieces of the rows that no generation has, and the manifest with them."""
    manifest = read_manifest(build)
    done = manifest["generations"][-1]["shards"][1] if manifest["generations"] else 0
    new = parts[done:]
    _make_again(build, manifest, parts)
    if not new:
        return manifest
    if manifest["merged"] and not build.config.merge:
        log.info(f"warning: {build.folder.below(MERGED).url} holds what there was before. With --merge it is made anew")
    first = sum(part.rows for part in parts[:done])
    facts = facts_of(build.folder.below(ROWS), new)
    row_bytes, overhead = _row_bytes(build), len(build.folder.read(TRAINED))
    merged = 1 if done else build.config.merge or 1  # of an addition as few as may be: each repeats the centroids
    pieces = _assembled(build, grouped(new, row_bytes, overhead, merged), first)
    vectors = sum(fact["vectors"] for fact in facts)
    error = sum(fact["error"] * fact["vectors"] for fact in facts) / max(vectors, 1)
    generation = {
        "shards": [done, len(parts)],
        "rows": sum(part.rows for part in new),
        "vectors": vectors,
        "error": error,
        "pieces": pieces,
    }
    manifest = {"generations": [*manifest["generations"], generation], "merged": []}
    if read_manifest(build)["generations"] != manifest["generations"][:-1]:
        raise RunError(
            f"another command added to {build.folder.url} meanwhile. Start this one again: it goes on from there"
        )
    build.folder.publish(MANIFEST, json.dumps(manifest, indent=1).encode())
    _keep_only(build.folder.below(SEGMENTS), {piece["name"] for piece in pieces_of(manifest)})
    build.folder.sweep(done={TRAINED, MANIFEST})
    return manifest


def _make_again(build: IndexBuild, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Pieces that the manifest names and that are gone, or not whole, from the rows they were made of."""
    place = build.folder.below(SEGMENTS)
    there = place.list()
    for generation in manifest["generations"]:
        lost = [piece["name"] for piece in generation["pieces"] if there.get(piece["name"]) != piece["bytes"]]
        if not lost:
            continue
        log.info(f"warning: {len(lost)} pieces of {place.url} are gone, {lost[0]} the first: they are made again")
        first, stop = generation["shards"]
        groups = _as_before(parts[first:stop], generation["pieces"])
        _assembled(build, groups, generation["pieces"][0]["first"], again=True)


def _as_before(parts: Sequence[Part], pieces: Sequence[dict[str, Any]]) -> list[list[Part]]:
    """The parts of each piece, by the rows that it has."""
    ends = np.cumsum([piece["rows"] for piece in pieces])
    places = np.searchsorted(ends, np.cumsum([part.rows for part in parts])).tolist()
    return [[part for part, place in zip(parts, places, strict=True) if place == at] for at in range(len(pieces))]


def _row_bytes(build: IndexBuild) -> float:
    return build.kind.bytes(build.vectors.dim) + ID_BYTES


def _keep_only(folder: Folder, named: set[str]) -> None:
    """Remove what no manifest names: of a command that was stopped, or of an index before this one."""
    for stale in folder.list().keys() - named:
        folder.remove(stale)
    folder.sweep(done=named)


def _assembled(
    build: IndexBuild, groups: Sequence[Sequence[Part]], first: int, again: bool = False
) -> list[dict[str, Any]]:
    """What is known of the new pieces, one of each group of parts. again: of those too that were made before."""
    rows, trained = build.folder.below(ROWS), build.folder.read(TRAINED)
    firsts = [first]
    for group in groups:
        firsts.append(firsts[-1] + sum(part.rows for part in group))
    key = fingerprint(build.key, [[part.part for part in group] for group in groups])
    names = tuple(f"piece-{start:012d}-{key}.faiss" for start in firsts[:-1])
    files = [files_of(rows, group) for group in groups]

    def verb(ledger: Run, workers: WorkerPlan) -> BuildSegment:
        place = build.folder.below(SEGMENTS)
        return BuildSegment(build.kind, build.folder, place, names, tuple(firsts), workers.threads, build.storage)

    most = max(sum(part.rows for part in group) for group in groups) * _row_bytes(build) + 2 * len(trained)
    folder = build.stage(f"assemble-{key}")
    if again:
        folder.remove_all()
    job = Job(f"filling {len(groups)} pieces", {"verb": "assemble", "names": list(names)}, verb, weight_bytes=int(most))
    options = build.options(rows.url, folder)
    made = require_complete(carry_out_planned(job, options, lambda: files_plan(files)), folder.url).parts
    return facts_of(folder, made)


def pieces_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [piece for generation in manifest["generations"] for piece in generation["pieces"]]


def piece_files(build: IndexBuild, pieces: Sequence[dict[str, Any]]) -> list[File]:
    folder = build.folder.below(SEGMENTS)
    return [File(folder.path(piece["name"]), piece["vectors"], piece["bytes"]) for piece in pieces]


def merge(build: IndexBuild, manifest: Manifest, count: int) -> Manifest:
    """The pieces merged on disk into `count` indexes of about as many vectors, or as many as there are pieces."""
    place, pieces = build.folder.below(MERGED), pieces_of(manifest)
    groups = balanced(pieces, count)
    key = fingerprint(build.key, [[piece["name"] for piece in group] for group in groups])
    names = tuple(f"merged-{number:03d}-{key}.faiss" for number in range(len(groups)))
    if len(groups) < count:
        log.info(
            f"--merge {count}: {len(groups)} are made, of {len(pieces)} pieces. For more choose a new --output and fewer --shard-rows"
        )
    if [merged["name"] for merged in manifest["merged"]] == list(names) and _all_there(place, manifest["merged"]):
        return manifest

    def verb(ledger: Run, workers: WorkerPlan) -> MergeSegments:
        return MergeSegments(build.folder, place, names, build.storage)

    folder = build.stage(f"merge-{key}")
    if (before := read_parts_manifest(folder)) and not _all_there(place, facts_of(folder, before)):
        folder.remove_all()  # merged otherwise since, and so removed
    held = 2 * build.folder.list(TRAINED)[TRAINED] + LIST_BYTES * lists_in(build) * max(map(len, groups))
    job = Job(f"merging on disk into {len(groups)}", {"verb": "merge", "names": list(names)}, verb, weight_bytes=held)
    files = [piece_files(build, group) for group in groups]
    options = build.options(build.folder.below(SEGMENTS).url, folder)
    made = require_complete(carry_out_planned(job, options, lambda: files_plan(files)), folder.url).parts
    manifest = manifest | {"merged": facts_of(folder, made)}
    build.folder.publish(MANIFEST, json.dumps(manifest, indent=1).encode())
    _keep_only(place, {file["name"] for merged in manifest["merged"] for file in merged["files"]})
    return manifest


def _all_there(folder: Folder, merged: Sequence[dict[str, Any]]) -> bool:
    there = folder.list()
    return all(there.get(file["name"]) == file["bytes"] for each in merged for file in each["files"])


def balanced(pieces: Sequence[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Neighbouring pieces in `count` groups of about as many vectors; fewer where there are fewer pieces."""
    total = sum(piece["vectors"] for piece in pieces)
    groups: dict[int, list[dict[str, Any]]] = {}
    before = 0
    for piece in pieces:
        middle = before + piece["vectors"] / 2
        groups.setdefault(min(count - 1, int(middle * count / max(total, 1))), []).append(piece)
        before += piece["vectors"]
    return list(groups.values())


def lists_in(build: IndexBuild) -> int:
    """Inverted lists of the trained index: what was asked for, or fewer where the sample had not so many points."""
    return lists_of(load_index(build.folder.read(TRAINED))).nlist if build.kind.has_lists else 0

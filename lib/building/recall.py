"""The driver of the measurement: held vectors, or queries that were given, against exact search over everything there is."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..cluster import Workers
from ..corpus import list_files, measure
from ..errors import InputError
from ..indexes import efforts
from ..indexing import Build, digest
from ..job import Job, carry_out_planned, whole
from ..ledger import Ledger, read_plan
from ..parts import Part, parquet_bytes, read_manifest
from ..plan import cut, heads
from ..storage import Folder
from . import FILE, HELD, NUMBER, ROW, ROWS, VECTOR
from .growing import Manifest, lists_in, piece_files
from .log import Say
from .measure import LISTED, PARTS_AT_ONCE, QUERIES, Lists, Measured, Probe, Shorten, Truth, best_lists, measured
from .reading import File, facts_of, files_of, files_plan, matrix, read_parts, some_shards
from .source import VectorOptions, describe
from .training import draw, source

QUERY_BLOCKS = 32  # of a file of queries, evenly over it


def measure_recall(build: Build, manifest: Manifest, say: Say) -> tuple[list[Measured], int]:
    """By effort; and how many queries it is measured with. Only what new generations hold is searched again."""
    plan, columns = read_plan(build.folder.below(ROWS))
    name = digest(build.key, build.config.queries, build.config.recall_queries)
    place = build.stage(f"queries-{name}")
    if not place.exists(QUERIES):
        place.claim(QUERIES, parquet_bytes(_queries(build, plan, say)))
    own = pq.read_table(pa.BufferReader(place.read(QUERIES)))[NUMBER].to_numpy()
    if not len(own):
        raise InputError(
            "no vector to measure recall with: every row of the sample lacks one. Give some with --queries"
        )
    wanted = efforts(build.kind, lists_in(build))
    truth: list[File] = []
    probes: list[File] = []
    seconds = dict.fromkeys(wanted, 0.0)
    for generation in manifest["generations"]:
        key = digest(name, generation["shards"], [piece["name"] for piece in generation["pieces"]])
        shards = some_shards(plan, *generation["shards"])
        truth += _shortened(build, place, _truth(build, place, key, shards, columns, generation, say), say)
        probed, folder = _probe(build, place, key, generation, wanted, say), build.stage(f"probe-{key}")
        for fact in facts_of(folder, probed):
            for effort in wanted:
                seconds[effort] += fact["seconds"][str(effort)]
        probes += _shortened(build, place, files_of(folder, probed), say)
    _, true = _best(build, truth, own)[0]
    found = {effort: numbers for effort, (_, numbers) in _best(build, probes, own).items()}
    return measured(found, true, seconds), len(own)


def _best(build: Build, files: Sequence[File], own: np.ndarray) -> dict[int, Lists]:
    paths = pa.table({"path": [file.path for file in files]})
    return best_lists(read_parts(paths, LISTED, build.storage), own)


def _shortened(build: Build, place: Folder, files: list[File], say: Say) -> list[File]:
    """The same lists in few enough parts for the driver to go through."""
    if len(files) <= PARTS_AT_ONCE:
        return files
    key = digest([file.path for file in files])
    folder, job = (
        build.stage(f"lists-{key}"),
        Job("shortening the lists", {"verb": "lists", "key": key}, _shorten(build, place)),
    )
    groups = [files[start : start + PARTS_AT_ONCE] for start in range(0, len(files), PARTS_AT_ONCE)]
    outcome = carry_out_planned(job, build.options(place.url, folder), lambda: files_plan(groups), say)
    return _shortened(build, place, files_of(folder, whole(outcome, folder.url).parts), say)


def _shorten(build: Build, place: Folder) -> Callable[[Ledger, Workers], Shorten]:
    return lambda ledger, workers: Shorten(place, build.storage)


def _queries(build: Build, plan: pa.Table, say: Say) -> pa.Table:
    """VECTOR and NUMBER of those that are asked for."""
    if build.config.queries:
        vectors = _given(build)
        numbers = np.full(len(vectors), -1, np.int64)
    else:
        folder = build.stage("sample")
        parts = read_manifest(folder) or draw(build, say)
        paths = pa.table({"path": [folder.path(part.part) for part in parts]})
        held = pa.concat_tables(
            table.filter(table[HELD]) for table in read_parts(paths, [VECTOR, FILE, ROW, HELD], build.storage)
        )
        numbers = _numbers(plan, held[FILE].to_pylist(), held[ROW].to_numpy())
        vectors = matrix(held[VECTOR])
        vectors, numbers = vectors[numbers >= 0], numbers[numbers >= 0]
    most = build.config.recall_queries
    kept = np.linspace(0, len(vectors) - 1, min(most, len(vectors))).round().astype(np.int64)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[kept].reshape(-1)), build.vectors.dim)
    return pa.table({VECTOR: column, NUMBER: numbers[kept]})


def _given(build: Build) -> np.ndarray:
    """Vectors of --queries, evenly over the first rows of blocks of it. Raises InputError for those of another model."""
    url = str(build.config.queries)
    options = VectorOptions(input=url, output=url, keep_columns=(build.config.vector_column,))
    files = list_files(options, build.storage)
    about = describe(files, build.config.vector_column, build.storage)
    differing = [name for name in ("model", "revision", "dim") if about.made.get(name) != build.vectors.made.get(name)]
    if about.dim != build.vectors.dim or (about.made and build.vectors.made and differing):
        raise InputError(
            f"--queries {url}: vectors of {about.made.get('model')} in {about.dim} dimensions, the index's are of "
            f"{build.vectors.made.get('model')} in {build.vectors.dim}. Embed the queries with the same model"
        )
    corpus = measure(files, options, build.storage, strict=True)
    each = -(-build.config.recall_queries // QUERY_BLOCKS)
    blocks = heads(cut(corpus, max(each, int(corpus.rows // QUERY_BLOCKS))), QUERY_BLOCKS, each)
    rows = [source(build, corpus.schema).read(block) for block in blocks]
    return np.concatenate([read.vectors[read.good] for read in rows])


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


def _truth(
    build: Build, place: Folder, key: str, shards: pa.Table, columns: pa.Schema, generation: dict[str, Any], say: Say
) -> list[File]:
    """The parts of nearest vectors."""
    rows = shards.group_by("shard", use_threads=False).aggregate([("rows", "sum")])["rows_sum"].to_numpy()
    start = generation["pieces"][0]["first"]
    firsts = tuple((start + np.cumsum(rows) - rows).tolist())

    def verb(ledger: Ledger, workers: Workers) -> Truth:
        return Truth(source(build, ledger.columns), build.config.metric, place, firsts, workers.threads)

    folder = build.stage(f"truth-{key}")
    job = Job("exact search of the queries", {"verb": "truth", "key": key}, verb)
    options = build.options(build.config.input, folder)
    outcome = whole(carry_out_planned(job, options, lambda: (shards, columns), say), folder.url)
    return files_of(folder, outcome.parts)


def _probe(
    build: Build, place: Folder, key: str, generation: dict[str, Any], wanted: Sequence[int], say: Say
) -> list[Part]:
    """The parts of what the generation's pieces find."""

    def verb(ledger: Ledger, workers: Workers) -> Probe:
        return Probe(build.kind, build.config.metric, tuple(wanted), place, workers.threads, build.storage)

    folder, files = build.stage(f"probe-{key}"), piece_files(build, generation["pieces"])
    job = Job("searching the index", {"verb": "probe", "key": key, "efforts": list(wanted)}, verb)
    options = build.options(place.url, folder)
    outcome = carry_out_planned(job, options, lambda: files_plan([[file] for file in files]), say)
    return whole(outcome, folder.url).parts

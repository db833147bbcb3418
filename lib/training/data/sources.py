"""The files of a training plan, one entry for each --data: their names, sizes, columns and first rows."""

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ...data.columns import hive_keys
from ...data.corpus import Corpus, CorpusOptions, list_files
from ...data.corpus import measure as measure_files
from ...data.formats import Measure
from ...data.shards import Shard, cut_shards, sample_shards
from ...engine.job import refuse_nested
from ...engine.shuffle import REASON
from ...errors import InputError, UsageError
from ...storage.fingerprint import fingerprint
from ...storage.listing import WILDCARDS
from .pairs import ALONE, ALONE_OPTIONAL, NEEDED, OPTIONAL, as_pairs, read_pairs

NAME = re.compile(r"[\w.-]+")
SAMPLE_FILES, SAMPLE_ROWS, SAMPLE_THREADS = 64, 100, 16
BUCKET_BATCHES, MIN_BATCHES = 64, 4  # of a bucket; half a batch of each bucket is left over on average
MIN_ROWS, MAX_ROWS = 25_000, 200_000  # of a bucket, unless its batches are larger
BUCKET_BYTES = 256 << 20  # a worker needs a few times as much memory
FORMS = "A pair has a text in 'query' and one or a list of texts in 'pos'; 'text' without them is for pretraining"


@dataclass(frozen=True)
class Entry:
    """One --data: its name, its options as a corpus, and its measured files.

    columns: what its files have of those that are read; odd: by path, what those have that are unlike the others.
    """

    name: str
    options: CorpusOptions
    corpus: Corpus
    columns: pa.Schema
    odd: Mapping[str, pa.Schema]

    @property
    def by_dataset(self) -> bool:
        """True where a column names the dataset of each row."""
        return "dataset" in self.corpus.schema.names

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.corpus.files, digits=16)

    def buckets(self, global_batch: int) -> int:
        """The number of buckets of its rows: 64 batches each, within bounds of rows and bytes."""
        rows = min(
            max(BUCKET_BATCHES * global_batch, MIN_ROWS), MAX_ROWS, BUCKET_BYTES / max(self.corpus.row_bytes, 1.0)
        )
        return max(1, math.ceil(self.corpus.rows / max(rows, MIN_BATCHES * global_batch)))


def parse_data(data: Sequence[str]) -> dict[str, str]:
    """`NAME=URL` and `URL` words as URLs by name. Raises UsageError."""
    if not data:
        raise UsageError("no --data. Give a file, a folder or a glob of training pairs, or NAME=URL")
    urls: dict[str, str] = {}
    for word in data:
        before, equals, after = word.partition("=")
        named = equals and "/" not in before and ":" not in before
        name, url = (before, after) if named else (_stem(word), word)
        if not NAME.fullmatch(name) or name.startswith("."):
            what = f"{name!r} is no name of letters, digits, and . _ -"
            raise UsageError(f"--data {word!r}: {what}. Write it as NAME={url}")
        if not url:
            raise UsageError(f"--data {word!r} has no URL. Write it as NAME=URL")
        if name in urls:
            both = f"{urls[name]} and {url}"
            raise UsageError(f"two --data are named {name!r}: {both}. Name one otherwise, as NAME={url}")
        urls[name] = url
    return urls


def _stem(url: str) -> str:
    """The last name of a URL that is no pattern, without its endings."""
    names = [name for name in url.split("/") if name and not any(letter in name for letter in WILDCARDS)]
    return names[-1].split(".")[0] if names else ""


def parse_weights(words: Sequence[str]) -> dict[str, float]:
    """`NAME=2.0` words. Raises UsageError for what is no positive number, and for a name with two weights."""
    weights: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < math.inf:
            raise UsageError(f"--weight {word!r} is not NAME=NUMBER with a number above 0, as in nli=0.5")
        if name in weights:
            raise UsageError(f"--weight names {name!r} twice. Give it one weight")
        weights[name] = weight
    return weights


class _PairOptions(CorpusOptions):
    """Options of files that are each read with their own types."""

    same_types = False


class _AnyColumns(_PairOptions):
    """Options without a text column: the files' columns decide which are needed."""

    def text_columns(self) -> list[str]:
        return []


def open_entry(name: str, url: str, output: str, storage: Mapping[str, Any]) -> Entry:
    """List and measure an entry's files and look at their first rows. output: of the training, which must not lie in the input.

    Raises InputError where there is no file, a file without the columns `query` and `pos`, or `text` in their place in
    all of them, or one that begins with nothing but rows that cannot be used.
    """
    options = _PairOptions(input=url)
    refuse_nested(url, output, storage)
    files = list_files(options, storage)
    corpus = measure_files(files, _AnyColumns(input=url), storage, strict=False)
    needed = _needed(corpus)
    optional = OPTIONAL if needed == NEEDED else ALONE_OPTIONAL
    keep = (*needed[1:], *_common(corpus, optional))
    options = replace(options, text_template=f"{{{needed[0]}}}", keep_columns=keep)
    if any(isinstance(m, Measure) and m.complete for m in corpus.measures):  # again, with the bytes that will be read
        corpus = measure_files(files, options, storage, strict=False)
    wanted = (*needed, *optional)
    measured = zip(files, corpus.measures, strict=True)
    schemas = [_own(f.name, m, wanted) if isinstance(m, Measure) and m.units else None for f, m in measured]
    columns = next((schema for schema in schemas if schema is not None), pa.schema([]))
    odd = {f.path: s for f, s in zip(files, schemas, strict=True) if s is not None and s != columns}
    entry = Entry(name, options, corpus, columns, odd)
    _look(entry, storage)
    return entry


def _needed(corpus: Corpus) -> tuple[str, ...]:
    """The columns that every file must have: NEEDED, or ALONE where they are of single texts. Raises InputError."""
    measured = zip(corpus.files, corpus.measures, strict=True)
    readable = [(f, m) for f, m in measured if isinstance(m, Measure) and (m.units or m.schema.names)]
    measures = {f.path: m for f, m in readable}
    names = {f.path: [*dict.fromkeys((*m.schema.names, *hive_keys(f.name)))] for f, m in readable}
    pairs = [path for path, own in names.items() if not {*NEEDED}.isdisjoint(own)]
    alone = [path for path, own in names.items() if ALONE[0] in own and {*NEEDED}.isdisjoint(own)]
    if pairs and alone:
        both = f"{alone[0]} has single texts and {pairs[0]} pairs"
        raise InputError(f"{both}. {FORMS}: give each kind as a --data of its own")
    needed = ALONE if alone else NEEDED
    for path, measure in measures.items():
        known = names[path] if measure.complete else corpus.schema.names
        if missing := [name for name in needed if name not in known]:
            raise InputError(f"no column {missing[0]!r} in {path}. Columns there: {', '.join(known)}. {FORMS}")
    return needed


def _common(corpus: Corpus, optional: Sequence[str]) -> list[str]:
    """Optional columns that every file has, where measuring names all columns."""
    measures = [m for m in corpus.measures if isinstance(m, Measure) and m.units]
    if not all(measure.complete for measure in measures):
        return []
    return [name for name in optional if measures and all(name in measure.schema.names for measure in measures)]


def _own(name: str, measure: Measure, wanted: Sequence[str]) -> pa.Schema:
    """The wanted columns that a file has, by its own types; all of them where only reading can name its columns."""
    types = dict(zip(measure.schema.names, measure.schema.types, strict=True))
    types = dict.fromkeys(hive_keys(name), pa.string()) | types
    if not measure.complete:
        types = dict.fromkeys(wanted, pa.large_string()) | types
    return pa.schema([(column, types[column]) for column in wanted if column in types])


def _look(entry: Entry, storage: Mapping[str, Any]) -> None:
    """Raises InputError for a file of which no row among the first can be used."""
    places = [i for i, m in enumerate(entry.corpus.measures) if isinstance(m, Measure) and m.units]
    some = sorted({places[i * len(places) // SAMPLE_FILES] for i in range(SAMPLE_FILES)}) if places else []
    with ThreadPoolExecutor(SAMPLE_THREADS) as threads:
        for _ in threads.map(lambda place: _check_head(entry, place, storage), some):
            pass


def _check_head(entry: Entry, place: int, storage: Mapping[str, Any]) -> None:
    file, measure = entry.corpus.files[place], entry.corpus.measures[place]
    alone = replace(entry.corpus, files=(file,), measures=(measure,))
    head: list[Shard] = sample_shards(cut_shards(alone, int(alone.rows) + 1), 1, SAMPLE_ROWS)
    tables = [as_pairs(t, entry.name) for shard in head for t in read_pairs(shard, entry.columns, entry.odd, storage)]
    rows = pa.concat_tables(tables)
    if rows.num_rows and not rows[REASON].null_count:
        first = f"{rows['source'][0]}: {rows[REASON][0]}"
        raise InputError(
            f"none of the first {rows.num_rows} rows of {file.path} can be used; the first is {first}. {FORMS}"
        )

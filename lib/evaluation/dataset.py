"""A task's data in memory: queries, qrels, candidates. The corpus is not read."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.corpus import CorpusOptions, columns_at, list_files, measure
from ..data.reader import first_with_reason, read_rows
from ..data.shards import cut_shards, shards
from ..data.texts import as_text
from ..engine.parts import parquet_bytes
from ..errors import InputError
from ..storage.folder import Folder
from .dataset_layouts import TableUrls

IDS = ("_id", "id", "docid", "doc_id", "pid", "qid")  # columns that may name a row
QUERY_IDS = ("query-id", "query_id", "qid")
PASSAGE_IDS = ("corpus-id", "corpus_id", "passage_id", "docid", "doc_id", "pid")
MANY_PASSAGE_IDS = ("corpus-ids", "corpus_ids")
GRADES = ("score", "relevance", "label", "grade")
LISTS = ("positive", "negative")
TEXTS = ("text", "query", "contents")
ROWS_AT_ONCE = 100_000
NAMED = 3  # ids or reasons that a note names; it counts all
LISTED_PASSAGES = "passages.parquet"


@dataclass(frozen=True)
class Passages:
    """A corpus in place: URL, the column of its ids, the template of its texts."""

    url: str
    id_column: str
    template: str


@dataclass(frozen=True)
class Dataset:
    """The data of a task.

    queries: id, text (large_string), those with judgments and a row. qrels: grades of passages, by query. candidates: query_id,
    passage_id; None where the whole corpus is searched. notes: sentences on irregular rows, for the report.
    """

    passages: Passages
    queries: pa.Table
    qrels: Mapping[str, Mapping[str, int]]
    candidates: pa.Table | None = None
    notes: tuple[str, ...] = ()


def read_dataset(tables: TableUrls, split: str, passage_template: str | None, folder: Folder) -> Dataset:
    """The dataset in these tables.

    passage_template: takes precedence over the corpus's own template: title and text, or text. folder: for passages that come
    only as lists of positives and negatives. Raises InputError for tables that cannot be scored: missing columns, repeated ids,
    judgments of unknown queries.
    """
    storage = folder.options
    if set(LISTS) <= set(columns_at(tables.judgments, storage)):
        return _from_lists(tables.judgments, split, folder)
    if tables.corpus is None or tables.queries is None:
        absent = "corpus" if tables.corpus is None else "queries"
        raise InputError(
            f"{tables.judgments} is there, but no file or folder {absent!r} beside it. Add it, or give --corpus, --queries "
            "and --qrels"
        )
    qrels, notes = _qrels(tables.judgments, storage)
    queries = _queries(tables.queries, qrels, storage)
    candidates = _candidates(tables.candidates, qrels, storage) if tables.candidates else None
    passages = _passages(tables.corpus, passage_template, storage)
    return Dataset(passages, queries, qrels, candidates, tuple(notes))


def read_table(url: str, columns: Sequence[str], storage: Mapping[str, Any]) -> pa.Table:
    """Read columns of all rows into memory. Raises InputError for a row that cannot be read."""
    tables = list(tables_at(url, columns, storage))
    if not tables:
        raise InputError(f"{url} has no rows")
    table = pa.concat_tables(tables).combine_chunks()
    if (row := first_with_reason(table["_error"])) is not None:
        raise InputError(f"{table['_source'][row]}: {table['_error'][row]}. Mend the file")
    return table


def tables_at(url: str, columns: Sequence[str], storage: Mapping[str, Any]) -> Iterator[pa.Table]:
    options = CorpusOptions(input=url, text_column=columns[0], keep_columns=tuple(columns[1:]))
    corpus = measure(list_files(options, storage), options, storage, strict=True)
    for shard in shards(cut_shards(corpus, ROWS_AT_ONCE)):
        yield read_rows(shard, columns, corpus.schema, storage)


def _pick(url: str, columns: Sequence[str], wanted: Mapping[str, Sequence[str]]) -> list[str]:
    """The columns of what is wanted: of each the first of its names that is there."""
    picked = [next((name for name in names if name in columns), "") for names in wanted.values()]
    for name, (what, names) in zip(picked, wanted.items(), strict=True):
        if not name:
            listed = f"looked for {', '.join(names)}, there are {', '.join(columns)}"
            raise InputError(f"no column with the {what} in {url}: {listed}")
    return picked


def ids_of(table: pa.Table, name: str, url: str) -> pa.Array:
    """A column of ids as text. Raises InputError for a row without one."""
    ids = as_text(table[name])[0]
    if ids.null_count:
        place = table["_source"][pc.index(pc.is_null(ids), True).as_py()]
        raise InputError(f"{ids.null_count:,} rows of {url} have no {name!r}, the first is {place}. Give every row one")
    return ids


def _qrels(url: str, storage: Mapping[str, Any]) -> tuple[dict[str, dict[str, int]], list[str]]:
    wanted = {"query's id": QUERY_IDS, "passage's id": PASSAGE_IDS, "grade": GRADES}
    names = _pick(url, columns_at(url, storage), wanted)
    table = read_table(url, names, storage)
    queries, passages = (ids_of(table, name, url).to_pylist() for name in names[:2])
    grades = _grades(table, names[2], url)
    qrels: dict[str, dict[str, int]] = {}
    pairs = []
    for query, passage, grade in zip(queries, passages, grades, strict=True):
        judged = qrels.setdefault(query, {})
        if judged.setdefault(passage, grade) != grade:
            raise InputError(
                f"{url}: query {query!r} and passage {passage!r} have the grades {judged[passage]} and {grade}"
            )
        pairs.append((query, passage))
    repeated = [f"{query} {passage}" for (query, passage), count in Counter(pairs).items() if count > 1]
    message = note(repeated, "judgments come more than once, with one grade")
    return qrels, [message] if message else []


def _grades(table: pa.Table, name: str, url: str) -> list[int]:
    """Whole numbers, written as any type."""
    try:
        numbers = table[name].cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise InputError(f"{url}: a {name} is not a number ({error}). Write whole numbers") from error
    whole = pc.fill_null(pc.equal(pc.floor(numbers), numbers), False)
    if not pc.all(whole).as_py():
        row = pc.index(whole, False).as_py()
        raise InputError(f"{table['_source'][row]}: the {name} {table[name][row]} is not a whole number. Write one")
    return numbers.cast(pa.int64()).to_pylist()


def _queries(url: str, qrels: Mapping[str, Any], storage: Mapping[str, Any]) -> pa.Table:
    """The judged queries, in the order of the file."""
    names = _pick(url, columns_at(url, storage), {"query's id": IDS + QUERY_IDS, "query's text": TEXTS})
    table = read_table(url, names, storage)
    queries = pa.table({"id": ids_of(table, names[0], url), "text": as_text(table[names[1]])[0]})
    judged = queries.filter(pc.is_in(queries["id"], value_set=pa.array(qrels, pa.large_string())))
    if not judged.num_rows:
        raise InputError(f"none of the {len(qrels):,} judged queries is in {url}, among them {next(iter(qrels))!r}")
    return judged.combine_chunks()


def _candidates(url: str, qrels: Mapping[str, Any], storage: Mapping[str, Any]) -> pa.Table:
    """Pairs of judged queries, each once."""
    wanted = {"query's id": QUERY_IDS, "passages' ids": PASSAGE_IDS + MANY_PASSAGE_IDS}
    names = _pick(url, columns_at(url, storage), wanted)
    table = read_table(url, names, storage)
    queries = ids_of(table, names[0], url)
    if names[1] in MANY_PASSAGE_IDS:
        lists = [_list(each, url) for each in table[names[1]].to_pylist()]
        queries = queries.take(pa.array(np.repeat(np.arange(len(lists)), [len(each) for each in lists])))
        passages = pa.array([one for each in lists for one in each], pa.large_string())
    else:
        passages = ids_of(table, names[1], url)
    pairs = pa.table({"query_id": queries, "passage_id": passages})
    pairs = pairs.filter(pc.is_in(pairs["query_id"], value_set=pa.array(qrels, pa.large_string())))
    return pairs.group_by(["query_id", "passage_id"], use_threads=False).aggregate([])


def _passages(url: str, template: str | None, storage: Mapping[str, Any]) -> Passages:
    columns = columns_at(url, storage)
    id_column, text = _pick(url, columns, {"passage's id": IDS + PASSAGE_IDS, "passage's text": TEXTS})
    if template is not None and "{title}" in template and "title" not in columns:
        template = None
    return Passages(url, id_column, template or (f"{{title}} {{{text}}}" if "title" in columns else f"{{{text}}}"))


def _from_lists(url: str, split: str, folder: Folder) -> Dataset:
    """The dataset of rows with a query, its positives and its negatives: every text is a passage, and a candidate of its query.

    Ids are those of mteb, since they break ties. Rows without a positive or without a negative are left out, as in mteb.
    """
    table = read_table(url, ["query", *LISTS], folder.options).select(["query", *LISTS])
    rows = [row | {kind: _list(row[kind], url) for kind in LISTS} for row in table.to_pylist()]
    kept = [row for row in rows if all(row[kind] for kind in LISTS)]
    if not kept:
        raise InputError(f"{url}: no row has both a positive and a negative")
    names = [f"{split}_query{i}" for i in range(len(kept))]
    listed = [
        (query, f"{'apositive' if kind == 'positive' else kind}_{query}_{place:05d}", text, int(kind == "positive"))
        for query, row in zip(names, kept, strict=True)
        for kind in LISTS
        for place, text in enumerate(row[kind])
    ]
    qrels: dict[str, dict[str, int]] = {query: {} for query in names}
    for query, passage, _, grade in listed:
        qrels[query][passage] = grade
    of, ids, texts, _ = zip(*listed, strict=True)
    folder.claim(LISTED_PASSAGES, parquet_bytes(text_table({"id": ids, "text": texts})))
    note = f"{len(rows) - len(kept):,} rows without a positive or without a negative are left out, as mteb does"
    return Dataset(
        Passages(folder.path(LISTED_PASSAGES), "id", "{text}"),
        text_table({"id": names, "text": [row["query"] for row in kept]}),
        qrels,
        text_table({"query_id": of, "passage_id": ids}),
        (note,) if len(kept) < len(rows) else (),
    )


def text_table(columns: Mapping[str, Sequence[str | None]]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.large_string()) for name, values in columns.items()})


def _list(value: Any, url: str) -> list[str]:
    """A list of texts or ids, from a list as Parquet has it, from JSON text of other formats, or from a single text."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        value = parsed if isinstance(parsed, list) else [value]
    if None in (listed := value or []):
        raise InputError(f"{url}: a null in a list of texts or ids. Leave it out")
    return [str(each) for each in listed]


def note(ids: Sequence[str], what: str) -> str | None:
    """A sentence on some ids, as '2 queries are empty; each scores 0 (q1, q7)'; None for no id."""
    if not ids:
        return None
    more = ", ..." if len(ids) > NAMED else ""
    return f"{len(ids):,} {what} ({', '.join(ids[:NAMED])}{more})"

"""Irregular rows of a dataset: refused where they make scores meaningless, else counted and named in the report."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..data.unique_ids import check_unique_ids
from ..errors import InputError
from ..storage.folder import Folder
from .dataset import Dataset, Passages, ids_of, note, tables_at

NOTES = "notes.json"


def with_notes(dataset: Dataset, folder: Folder) -> Dataset:
    """The dataset with notes on its irregular rows. The folder keeps the notes: writing them reads every id of the corpus."""
    try:
        notes = json.loads(folder.read(NOTES))
    except FileNotFoundError:
        notes = check_dataset(dataset, folder.options)
        folder.claim(NOTES, json.dumps(notes, ensure_ascii=False).encode())
    return replace(dataset, notes=(*dataset.notes, *notes))


def check_dataset(dataset: Dataset, storage: Mapping[str, Any]) -> list[str]:
    """Notes on judged or candidate passages that are not in the corpus, and on queries that cannot score.

    Raises InputError for a repeated id, and where no judged passage is in the corpus.
    """
    check_unique_ids(lambda: dataset.queries["id"].chunks, "query", "the queries")
    judged = pa.array({passage for grades in dataset.qrels.values() for passage in grades}, pa.large_string())
    wanted = judged
    if dataset.candidates is not None:
        wanted = pa.concat_arrays([judged, dataset.candidates["passage_id"].unique()]).unique()
    known = _known_ids(dataset.passages, wanted, storage)
    absent = sorted(set(judged.to_pylist()) - known)
    if len(judged) and len(absent) == len(judged):
        raise InputError(
            f"none of the {len(judged):,} judged passages is in {dataset.passages.url}, among them {absent[0]!r}. Corpus and "
            f"qrels are of different datasets, or the ids are not in its column {dataset.passages.id_column!r}"
        )
    texts = dict(zip(*(dataset.queries[name].to_pylist() for name in ("id", "text")), strict=True))
    empty = [query for query in dataset.qrels if query in texts and not (texts[query] or "").strip()]
    hopeless = [query for query, grades in dataset.qrels.items() if not any(grade > 0 for grade in grades.values())]
    notes = [
        note(absent, "judged passages are not in the corpus; they count as never found"),
        note([q for q in dataset.qrels if q not in texts], "judged queries have no text; each scores 0"),
        note(empty, "queries are empty; each scores 0"),
        note(hopeless, "queries have no relevant passage; each scores 0"),
    ]
    if dataset.candidates is not None:
        unknown = sorted(set(dataset.candidates["passage_id"].to_pylist()) - known)
        without = sorted(set(dataset.qrels) - set(dataset.candidates["query_id"].to_pylist()))
        notes.append(note(unknown, "candidates are not in the corpus; they are left out"))
        notes.append(note(without, "queries have no candidates; each scores 0"))
    return [note for note in notes if note]


def _known_ids(passages: Passages, wanted: pa.Array, storage: Mapping[str, Any]) -> set[str]:
    """The wanted ids that are in the corpus. Memory: 8 bytes a passage. Raises InputError for a repeated id of the corpus."""
    known: set[str] = set()

    def chunks() -> Iterator[pa.Array]:
        for table in tables_at(passages.url, [passages.id_column], storage):
            readable = table.filter(pc.is_null(table["_error"]))  # other rows have no id; the embed job counts them
            ids = ids_of(readable, passages.id_column, passages.url)
            known.update(ids.filter(pc.is_in(ids, value_set=wanted)).to_pylist())
            yield ids

    check_unique_ids(chunks, "passage", passages.url)
    return known

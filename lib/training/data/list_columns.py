"""Columns of one value or a list of values a row: the forms that files use, read as one."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...data.reader import as_one_array
from ...data.texts import as_text

MOST_SCORE = float(np.finfo(np.float32).max)
NO_REASON = pa.scalar(None, pa.string())
WORDS = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())


class _UnfitError(Exception):
    """A value of one row that is not what its column should hold."""


@dataclass(frozen=True)
class ListColumn:
    """Lists of n rows, flattened.

    values: large_string or float32, one list after the other. counts: int64 [n], 0 for a null. absent: bool [n], where
    the row has no list at all. reasons: string [n], why a row's value cannot be used.
    """

    values: pa.Array
    counts: np.ndarray
    absent: np.ndarray
    reasons: pa.Array

    @property
    def rows(self) -> np.ndarray:
        """int64: the row of each value."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def keep(self, mask: np.ndarray) -> "ListColumn":
        """Only the values where `mask` (bool, one a value) is true."""
        counts = np.bincount(self.rows[mask], minlength=len(self.counts))
        return replace(self, values=self.values.filter(pa.array(mask)), counts=counts)

    def column(self, nulls: bool = False) -> pa.Array:
        """As a list array; a row without a list has an empty one, or with `nulls` null."""
        return as_lists(self.values, self.counts, self.absent if nulls else None)


def as_lists(values: pa.Array, counts: np.ndarray, absent: np.ndarray | None = None) -> pa.Array:
    """A list array of `values`, `counts` of them a row, null where `absent`."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=None if absent is None else pa.array(absent))


def text_lists(column: pa.ChunkedArray, name: str) -> ListColumn:
    """A column of texts or lists of texts. A text that is a JSON list of texts is that list: JSONL is read as such."""
    return _lists(column, name, pa.large_string(), as_text, _texts)


def score_lists(column: pa.ChunkedArray, name: str) -> ListColumn:
    """A column of numbers or lists of numbers, as numbers or as JSON text; float32, all finite."""
    return _lists(column, name, pa.float32(), _as_scores, _scores)


def no_lists(rows: int, kind: pa.DataType) -> ListColumn:
    """The lists of a column that a file lacks: none in any row."""
    counts = np.zeros(rows, np.int64)
    return ListColumn(pa.array([], kind), counts, np.ones(rows, bool), pa.nulls(rows, pa.string()))


def _lists(
    column: pa.ChunkedArray,
    name: str,
    kind: pa.DataType,
    leaves: Callable[[pa.Array], tuple[pa.Array, pa.Array]],
    parse: Callable[[str, str], Sequence[Any]],
) -> ListColumn:
    array = as_one_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_null(array.type):
        return no_lists(len(array), kind)
    absent = array.is_null().to_numpy(zero_copy_only=False)
    inner = array.type.value_type if _is_list(array.type) else array.type
    numbers = kind == pa.large_string() and inner != array.type and pa.types.is_primitive(inner)
    if pa.types.is_nested(inner) or numbers:
        reasons = pc.if_else(pa.array(absent), NO_REASON, f"{name} is {array.type}")
        return replace(no_lists(len(array), kind), absent=absent, reasons=reasons)
    if _is_list(array.type):
        counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
        values, unfit = leaves(array.flatten())
        return ListColumn(values, counts, absent, _by_row(unfit, counts, name))
    if array.type in WORDS:
        texts, broken = as_text(array)
        return _parsed(texts, broken, name, kind, parse)
    values, unfit = leaves(array.drop_null())
    counts = (~absent).astype(np.int64)
    return ListColumn(values, counts, absent, _by_row(unfit, counts, name))


def _parsed(
    texts: pa.Array, broken: pa.Array, name: str, kind: pa.DataType, parse: Callable[[str, str], Sequence[Any]]
) -> ListColumn:
    values: list[Any] = []
    counts, reasons = np.zeros(len(texts), np.int64), broken.to_pylist()
    for row, text in enumerate(texts.to_pylist()):
        if text is None:
            continue
        try:
            parsed = parse(text, name)
        except _UnfitError as unfit:
            reasons[row] = str(unfit)
            continue
        counts[row] = len(parsed)
        values += parsed
    absent = texts.is_null().to_numpy(zero_copy_only=False)
    return ListColumn(_array(values, kind), counts, absent, pa.array(reasons, pa.string()))


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # JSON may escape half a surrogate pair, which no UTF-8 column can hold
        return pa.array([v if v is None else v.encode("utf-8", "replace").decode() for v in values], kind)


def _texts(text: str, name: str) -> Sequence[str | None]:
    if text.lstrip()[:1] not in ("[", "{"):
        return [text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    if isinstance(value, list) and all(each is None or isinstance(each, str) for each in value):
        return value
    kind = "list of other things than texts" if isinstance(value, list) else "JSON object"
    raise _UnfitError(f"{name} is a {kind}; a text that looks like one must stand in a list")


def _scores(text: str, name: str) -> Sequence[float]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnfitError(f"{name} is neither a number nor a list of numbers") from error
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in values):
        raise _UnfitError(f"{name} is neither a number nor a list of numbers")
    if not all(abs(each) <= MOST_SCORE for each in values):  # not so for NaN
        raise _UnfitError(f"{name} is not finite")
    return [float(each) for each in values]


def _as_scores(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """float32, and a reason where a value is null, not finite, or no number."""
    try:
        scores = values.cast(pa.float64()).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(values), pa.float32()), pa.array(["not numbers"] * len(values), pa.string())
    fit = pc.fill_null(pc.is_finite(scores), False)
    return scores, pc.if_else(fit, NO_REASON, "null or not finite")


def _by_row(unfit: pa.Array, counts: np.ndarray, name: str) -> pa.Array:
    """The first reason among the values of each row, or null."""
    places = np.flatnonzero(unfit.is_valid().to_numpy(zero_copy_only=False))
    rows, first = np.unique(np.repeat(np.arange(len(counts)), counts)[places], return_index=True)
    reasons = np.full(len(counts), None, object)
    reasons[rows] = [f"{name}: {reason}" for reason in unfit.take(pa.array(places[first])).to_pylist()]
    return pa.array(reasons, pa.string())


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)

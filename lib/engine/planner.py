"""Planners: how a run gets its shards when its folder has no plan yet, and when its input has grown.

    describe     the part of a new run's config that the input decides: `columns`, `id_column`, `shard_rows`
    plan         the shards of a run that has none (PLAN_SCHEMA)
    extension    more shards, where the input has grown since the plan was made; None where it has not

`workers` are resolved before a plan is made, so that a cluster without room is refused before the work on the plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from ..data.columns import holds, schema_from, schema_text
from ..data.corpus import Corpus, RowOptions, list_files, measure
from ..data.shards import changed_files, count_shards, cut_shards
from ..errors import InputError
from .workers import WorkerRequest


@dataclass(frozen=True)
class CorpusPlanner:
    """Plans the rows of a corpus. shard_rows: rows a shard by default, of the corpus and the most workers there can be.

    Raises InputError for a corpus that cannot be listed or read, without rows, or with a planned file that has changed.
    """

    options: RowOptions
    storage: Mapping[str, Any]
    shard_rows: Callable[[Corpus, int], int]
    workers: WorkerRequest
    strict: bool = False

    @cached_property
    def files(self) -> list[Any]:
        return list_files(self.options, self.storage)

    @cached_property
    def corpus(self) -> Corpus:
        return measure(self.files, self.options, self.storage, self.strict)

    def rows_of_shard(self) -> int:
        return self.options.shard_rows or self.shard_rows(self.corpus, self.workers.resolve().maximum)

    def describe(self) -> dict[str, Any]:
        corpus = self.corpus
        if all(isinstance(each, str) for each in corpus.measures):
            raise InputError(f"no file at {self.options.input} can be read; the first: {corpus.measures[0]}")
        if not corpus.rows:
            raise InputError(f"{self.options.input} has no rows")
        columns = schema_text(corpus.schema)
        return {"columns": columns, "id_column": corpus.id_column, "shard_rows": self.rows_of_shard()}

    def plan(self, run_config: Mapping[str, Any]) -> pa.Table:
        planned = cut_shards(self.corpus, run_config["shard_rows"])
        if planned.num_rows == 0:
            raise InputError(f"{self.options.input} has no rows")
        return planned

    def extension(self, run_config: Mapping[str, Any], planned: pa.Table) -> pa.Table | None:
        """A limited run is closed: new files do not enter it. Files without a row are looked at each time, and planned never."""
        if complaints := changed_files(planned, self.files):
            more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
            raise InputError(
                f"the input is not what was planned: {'; '.join(complaints[:3])}{more}. "
                "Restore it, or choose a new --output: this one holds rows of the old input"
            )
        known = set(planned["path"].unique().to_pylist())
        new = [file for file in self.files if file.path not in known and file.size]
        if self.options.limit or not new:
            return None
        options = replace(self.options, id_column=run_config["id_column"])  # one column names old rows and new ones
        corpus = measure(new, options, self.storage, self.strict)
        if options.same_types:
            _check_types(schema_from(run_config["columns"]), corpus.schema, options.columns())
        added = cut_shards(corpus, run_config["shard_rows"], count_shards(planned))
        return added if added.num_rows else None


def _check_types(planned: pa.Schema, new: pa.Schema, columns: Sequence[str]) -> None:
    """Raises InputError for a column of new files whose values the type of the plan does not hold."""
    for name in columns:
        kind, own = planned.field(name).type, new.field(name).type if name in new.names else pa.null()
        if not holds(kind, own):
            raise InputError(
                f"column {name!r} is {own} in new files, and this run was planned with {kind}. Write them as {kind}, or choose a "
                "new --output for the whole input"
            )


@dataclass(frozen=True)
class FixedPlanner:
    """A plan that is made once, of what the settings fix. make: the plan (PLAN_SCHEMA) and the columns of its files."""

    make: Callable[[], tuple[pa.Table, pa.Schema]]
    workers: WorkerRequest

    @cached_property
    def _plan_and_columns(self) -> tuple[pa.Table, pa.Schema]:
        self.workers.resolve()
        return self.make()

    def describe(self) -> dict[str, Any]:
        return {"columns": schema_text(self._plan_and_columns[1]), "id_column": None, "shard_rows": 0}

    def plan(self, run_config: Mapping[str, Any]) -> pa.Table:
        return self._plan_and_columns[0]

    def extension(self, run_config: Mapping[str, Any], planned: pa.Table) -> None:
        return None


Planner = CorpusPlanner | FixedPlanner

"""The reader of a training plan: the row group of each step, of the part that the plan's order names.

The order is read whole; rows are read one row group a step.
"""

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import RunError
from ...storage.filesystem import absolute
from ...storage.folder import Folder

ORDER = "order.parquet"
SCHEMA = pa.schema([("step", pa.int64()), ("part", pa.string()), ("group", pa.int32()), ("dataset", pa.string())])
OPEN_PARTS = 8  # Parquet files, each with its footer in memory


class BatchReader:
    """A training plan, read step by step. url: the plan's folder. Threads may share it; one reads at a time."""

    def __init__(self, url: str, storage: Mapping[str, Any] | None = None):
        """Raises RunError where no finished plan is."""
        folder = Folder(absolute(url), dict(storage or {}))
        try:
            table = pq.read_table(pa.BufferReader(folder.read(ORDER)))
        except FileNotFoundError as error:
            raise RunError(f"no {ORDER} in {folder.url}: the plan is not finished. Start its command again") from error
        self.folder = folder
        parts = table["part"].combine_chunks().dictionary_encode()
        self._names: list[str] = parts.dictionary.to_pylist()
        self._parts, self._groups = parts.indices.to_numpy(), table["group"].to_numpy()
        self.steps: int = table.num_rows
        self._datasets: list[str] = table["dataset"].to_pylist()
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._lock = Lock()

    def first_steps(self) -> dict[str, int]:
        """The first step of each dataset."""
        return {name: self._datasets.index(name) for name in dict.fromkeys(self._datasets)}

    def read(self, step: int) -> pa.Table:
        """The global batch of a step, from 0, as BATCHES. Raises IndexError for a step that the plan does not have."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps}")
        with self._lock:  # a Parquet file has one place at a time
            parquet = self._file(self._names[self._parts[step]])
            return parquet.read_row_group(int(self._groups[step]), use_threads=False)

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._open:
            self._open[name] = pq.ParquetFile(self.folder.open(name))
            if len(self._open) > OPEN_PARTS:
                self._open.popitem(last=False)[1].close(force=True)
        self._open.move_to_end(name)
        return self._open[name]

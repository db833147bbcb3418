"""The output held against the input by pyarrow alone; what its values must be, each job's own file says."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

SAMPLE = 200  # rows that are computed again, one at a time
REASONS = ("null text", "empty text")


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    return (fs.LocalFileSystem(), url) if "://" not in url else fs.FileSystem.from_uri(url)


def read_folder(url: str, prefix: str = "") -> pa.Table:
    """Every Parquet file directly in the folder, as one table; `_` files are not of it."""
    system, path = filesystem(url)
    files = sorted(info.path for info in system.get_file_info(fs.FileSelector(path)) if info.is_file)
    chosen = [file for file in files if (name := file.rsplit("/", 1)[-1]).startswith(prefix) and name[0] not in "._"]
    return pa.concat_tables([pq.read_table(system.open_input_file(file)).replace_schema_metadata() for file in chosen])


def verify(job: ModuleType, inputs: str, output: str, model: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Counts, and what is wrong."""
    source, rows = read_folder(inputs), read_folder(output, "part-")
    system, path = filesystem(output)
    manifest = pq.read_table(system.open_input_file(f"{path}/_manifest.parquet"))
    wanted, found = Counter(source["id"].to_pylist()), Counter(rows["id"].to_pylist())
    counts = {
        "rows in": source.num_rows,
        "rows out": rows.num_rows,
        "distinct ids": len(found),
        "duplicates": sum(n - wanted[key] for key, n in found.items() if n > wanted[key] > 0),
        "missing": (wanted - found).total(),
        "foreign": sum(n for key, n in found.items() if key not in wanted),
        "manifest rows": pc.sum(manifest["rows"]).as_py(),
        "error rows": rows.num_rows - rows["error"].null_count,
    }
    problems = [f"{name}: {counts[name]}" for name in ("duplicates", "missing", "foreign") if counts[name]]
    if counts["manifest rows"] != source.num_rows:
        problems.append(f"the manifest has {counts['manifest rows']} rows of {source.num_rows}")
    if problems:
        return counts, problems
    more, problems = job.check(source, rows, model, seed)
    return counts | more, problems


def without_text(source: pa.Table, rows: pa.Table, columns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of the output, bool: whether one of the texts it was made of is empty, and whether it says so."""
    texts = zip(*(source[name].to_pylist() for name in columns), strict=True)
    empty_of = dict(
        zip(source["id"].to_pylist(), (not all((t or "").strip() for t in each) for each in texts), strict=True)
    )
    reasons = [(reason or "").endswith(REASONS) for reason in rows["error"].to_pylist()]
    return np.array([empty_of[key] for key in rows["id"].to_pylist()]), np.array(reasons)


def wrong(found: Mapping[str, np.ndarray]) -> list[str]:
    """A sentence for each kind of fault that some row has."""
    return [f"{name}: {int(rows.sum())}" for name, rows in found.items() if rows.any()]

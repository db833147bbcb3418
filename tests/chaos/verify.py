"""The output held against the input by pyarrow alone; only a sample's vectors need the product, one text at a time."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

SAMPLE = 200  # rows embedded again
NORM_TOLERANCE, VECTOR_TOLERANCE = 1e-3, 1e-5
REASONS = ("null text", "empty text")


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    return (fs.LocalFileSystem(), url) if "://" not in url else fs.FileSystem.from_uri(url)


def read_folder(url: str, prefix: str = "") -> pa.Table:
    """Every Parquet file directly in the folder, as one table; `_` files are not of it."""
    system, path = filesystem(url)
    files = sorted(info.path for info in system.get_file_info(fs.FileSelector(path)) if info.is_file)
    chosen = [file for file in files if (name := file.rsplit("/", 1)[-1]).startswith(prefix) and name[0] not in "._"]
    return pa.concat_tables([pq.read_table(system.open_input_file(file)).replace_schema_metadata() for file in chosen])


def verify(inputs: str, output: str, model: str, seed: int) -> tuple[dict[str, Any], list[str]]:
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
    if not problems:
        problems += check_rows(source, rows)
        counts["largest difference"] = difference = farthest(source, rows, model, seed)
        if not difference <= VECTOR_TOLERANCE:
            problems.append(f"a vector differs by {difference} from the text embedded alone")
    return counts, problems


def check_rows(source: pa.Table, rows: pa.Table) -> list[str]:
    """Rows without a text have a reason and no vector, all others a vector of norm 1 and no reason."""
    text_of = dict(zip(source["id"].to_pylist(), source["text"].to_pylist(), strict=True))
    empty = np.array([not (text_of[key] or "").strip() for key in rows["id"].to_pylist()])
    reasons = np.array([reason in REASONS for reason in rows["error"].to_pylist()])
    vectors = rows["embedding"].combine_chunks()
    absent = vectors.is_null().to_numpy(zero_copy_only=False)
    norms = np.linalg.norm(matrix(vectors.drop_null()), axis=1)
    wrong = {
        "rows without a text that lack a reason, or rows with one that have it": int((empty != reasons).sum()),
        "rows without a text that have a vector, or rows with one that lack it": int((empty != absent).sum()),
        "vectors whose norm is not 1": int((~(np.abs(norms - 1) <= NORM_TOLERANCE)).sum()),
    }
    return [f"{name}: {n}" for name, n in wrong.items() if n]


def matrix(vectors: pa.FixedSizeListArray) -> np.ndarray:
    return vectors.flatten().to_numpy().reshape(len(vectors), vectors.type.list_size)


def farthest(source: pa.Table, rows: pa.Table, model: str, seed: int) -> float:
    """The largest difference in any dimension of SAMPLE stored vectors from those texts embedded alone, one by one."""
    from lib.models import read_spec
    from lib.models.encoder import Encoder
    from lib.models.tokenizer import Tokenizer

    good = rows.filter(pc.is_valid(rows["embedding"]))
    sample = good.take(random.Random(seed).sample(range(len(good)), min(SAMPLE, len(good))))
    text_of = dict(zip(source["id"].to_pylist(), source["text"].to_pylist(), strict=True))
    spec = read_spec(model)
    encoder, tokenizer = Encoder(spec, dtype="float32", device="cpu"), Tokenizer(spec)
    again = np.stack([encoder.encode(tokenizer([text_of[key].strip()]))[0] for key in sample["id"].to_pylist()])
    return float(np.abs(again - matrix(sample["embedding"].combine_chunks())).max())

"""The same thousand rows in every format, and the way from files to the rows of their shards."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.corpus import CorpusOptions, list_files, measure
from lib.data.reader import read_rows
from lib.data.shards import cut_shards, shards

ROWS = [{"id": str(i), "text": f"text {i} " + "x" * (i % 50)} for i in range(1000)]


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=170)


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_gz(path):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def write_zst(path):
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)


def write_tsv(path):
    path.write_text("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ROWS))


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(row | {"text": row["text"] + '\n"quoted", line'} for row in ROWS)


def write_text(path):
    path.write_text("".join(row["text"] + "\n" for row in ROWS))


WRITERS = {
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.txt": write_text,
}


def everything(folder, shard_rows=100, **options):
    """(options, plan, one table a shard)."""
    options = CorpusOptions(input=str(folder), **options)
    corpus = measure(list_files(options, {}), options, {}, strict=False)
    plan = cut_shards(corpus, shard_rows)
    return plan, [read_rows(shard, options.columns(), corpus.schema, {}) for shard in shards(plan)]

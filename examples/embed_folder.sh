#!/usr/bin/env bash
# Embed a folder of documents on this machine, and read the vectors with plain pyarrow.
#   bash examples/embed_folder.sh docs/ vectors/
# Stopped at any moment, the same line goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
input=$1 output=$2 model=${MODEL:-BAAI/bge-m3}

python jobs/embed_corpus.py --input "$input" --output "$output" --model "$model" --output-dtype float16
python -c '
import sys, pyarrow.dataset as ds
table = ds.dataset(sys.argv[1], format="parquet").to_table(columns=["id", "embedding", "error"])
print(f"{len(table):,} rows, {table[1].null_count} of them without a vector, {table[1].type}")' "$output"

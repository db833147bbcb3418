#!/usr/bin/env bash
# Search an index with many queries, then rank the best 100 passages of each query with a reranker.
#   bash examples/search_and_rerank.sh index/ queries.jsonl docs.jsonl output/
# Queries and documents are rows of id and text; the ids of the documents are those of the index.
set -euo pipefail
cd "$(dirname "$0")/.."
index=$1 queries=$2 docs=$3 output=${4%/} reranker=${RERANKER:-BAAI/bge-reranker-v2-m3}

python jobs/search_index.py --index "$index" --input "$queries" --output "$output/candidates/" --top-k 100
python jobs/rerank_pairs.py --input "$output/candidates/" --queries "$queries" --corpus "$docs" \
    --output "$output/scores/" --model "$reranker" --top-k 10

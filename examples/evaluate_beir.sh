#!/usr/bin/env bash
# Score a model on a data set in BEIR's layout, without and with a reranker behind it, and compare both.
#   bash examples/evaluate_beir.sh scifact/ output/
# The folder holds corpus.jsonl, queries.jsonl and qrels/test.tsv.
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=$1 output=$2 model=${MODEL:-BAAI/bge-m3} reranker=${RERANKER:-BAAI/bge-reranker-v2-m3}

python jobs/evaluate_model.py --dataset "$dataset" --output "$output" --model "$model" --name retriever
python jobs/evaluate_model.py --dataset "$dataset" --output "$output" --model "$model" --name with-reranker \
    --reranker "$reranker" --rerank-top 50
python jobs/compare_models.py --input "$output"

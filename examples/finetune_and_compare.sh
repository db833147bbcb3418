#!/usr/bin/env bash
# Fine-tune a model on pairs, and compare it with the model it began from, on queries that it was not trained on.
#   bash examples/finetune_and_compare.sh pairs.jsonl heldout/ output/
# pairs.jsonl: rows of query, pos, perhaps neg. heldout/: corpus.jsonl, queries.jsonl, qrels/test.tsv.
set -euo pipefail
cd "$(dirname "$0")/.."
pairs=$1 heldout=$2 output=${3%/} model=${MODEL:-BAAI/bge-base-en-v1.5} steps=${STEPS:-500}

python jobs/finetune_model.py --model "$model" --data "$pairs" --output "$output/run/" --max-steps "$steps"
python jobs/evaluate_model.py --model "$model" --dataset "$heldout" --output "$output/scores/" --name before
python jobs/evaluate_model.py --model "$output/run/model" --dataset "$heldout" --output "$output/scores/" --name after
python jobs/compare_models.py --input "$output/scores/" --system before,after

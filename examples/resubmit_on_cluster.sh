#!/usr/bin/env bash
# Run a job on a cluster of spot machines until it is done: it is submitted again when its head or driver dies.
#   ray dashboard cluster/aws.yaml &
#   bash examples/resubmit_on_cluster.sh s3://BUCKET/corpus/docs/ s3://BUCKET/runs/vectors/
# The code of this checkout goes along. Started again, the script follows the job that is still running.
set -euo pipefail
cd "$(dirname "$0")/.."
input=$1 output=$2 model=${MODEL:-BAAI/bge-m3} address=${ADDRESS:-http://127.0.0.1:8265}

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
python jobs/submit_job.py --address "$address" --hours 12 -- \
    python jobs/embed_corpus.py --input "$input" --output "$output" --model "$model" \
    --gpus-per-worker "${GPUS:-1}" --max-workers "${WORKERS:-32}"

#!/usr/bin/env bash
# Embed a corpus from and to an S3 bucket, then build an index beside the vectors.
#   bash examples/embed_to_s3_and_index.sh s3://BUCKET
# Credentials, region and endpoint come from the standard AWS variables or your profile. The documents lie in corpus/.
set -euo pipefail
cd "$(dirname "$0")/.."
bucket=${1%/} model=${MODEL:-BAAI/bge-m3}

python jobs/embed_corpus.py --input "$bucket/corpus/" --output "$bucket/runs/vectors/" --model "$model"
python jobs/build_index.py --input "$bucket/runs/vectors/" --output "$bucket/runs/index/" --recall 0.9
echo "the index card is $bucket/runs/index/README.md"

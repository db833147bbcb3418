"""The folder of an index, and the columns of its stages. Every stage is a map over shards.

OUTPUT/_run.json            the settings of the build: the same ones resume, others are refused
OUTPUT/_stages/...          runs of the stages: the training sample, centroids, segments, measured recall
OUTPUT/trained.faiss        the empty index: centroids and codec
OUTPUT/rows/                a Parquet row for each input row: its id, its list and code, or the reason that it has none
OUTPUT/segments/            plain faiss files, each of some of the rows
OUTPUT/merged/              the segments merged on disk, with --merge
OUTPUT/manifest.json        the files of the index: written last
OUTPUT/card.json, README.md the index described, with its measured recall
"""

TRAINED, MANIFEST, CARD = "trained.faiss", "manifest.json", "card.json"
ROWS, SEGMENTS, MERGED = "rows", "segments", "merged"
LIST, CODE, VECTOR, NUMBER = "list", "code", "vector", "number"  # columns of the stages' parts
FILE, ROW, HELD_OUT = "file", "row", "held_out"

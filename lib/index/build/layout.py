"""How vectors become an index, a stage each: sample, train, encode, assemble, measure. Every stage is a map over shards.

OUTPUT/_run.json            what the build is: the same settings go on, others are refused
OUTPUT/_build/...           the stages' own runs: the sample, what was trained, what was measured
OUTPUT/trained.faiss        the empty index: centroids and codec
OUTPUT/rows/                a Parquet row for each input row: its id, its list and code, or the reason that it has none
OUTPUT/pieces/              plain faiss files, each with its own share of the rows
OUTPUT/merged/              the pieces merged on disk, where that was asked for
OUTPUT/manifest.json        which files the index is made of: written last
OUTPUT/card.json, README.md what it is, and its measured recall
"""

TRAINED, MANIFEST, CARD = "trained.faiss", "manifest.json", "card.json"
ROWS, SEGMENTS, MERGED, STAGES = "rows", "pieces", "merged", "_build"
LIST, CODE, VECTOR, NUMBER = "list", "code", "vector", "number"  # columns of what the stages leave
FILE, ROW, HELD = "file", "row", "held"
FACTS = b"shoal.facts"  # in a part's metadata: what its shard found out, as JSON

"""Make a small retrieval data set from the documentation of your Python: python examples/make_data.py quickstart/

    docs.jsonl      1,000 rows: id, text
    queries.jsonl   100 rows: id, text
    qrels.tsv       the document that answers each query: query-id, corpus-id, score
    pairs.jsonl     900 rows: query, pos; for training, about other documents than the queries

The query is the first sentence of a docstring, the document what follows it. Nothing is downloaded.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from benchmarks.corpora import python_documents

DOCUMENTS, QUERIES = 1_000, 100
WORDS = range(15, 120)  # of a document; shorter ones say too little, longer ones take too long


def split(text: str) -> tuple[str, str]:
    """The first sentence of a docstring, and the rest."""
    first, _, rest = " ".join(text.split()).partition(". ")
    return first.rstrip("."), rest


def rows() -> list[dict[str, str]]:
    """DOCUMENTS rows of id, query and text, in an order fixed by the hash of the id; no query and no text twice."""
    unique: dict[str, dict[str, str]] = {}
    for document in python_documents():
        query, text = split(document["text"])
        if len(text.split()) in WORDS and len(re.findall(r"[a-z]{3,}", query)) >= 3:
            unique.setdefault(query.lower(), {"id": document["id"], "query": query, "text": text})
    different = {row["text"]: row for row in {row["id"]: row for row in unique.values()}.values()}
    return sorted(different.values(), key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:DOCUMENTS]


def write(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    print(f"{len(items):,} rows in {path}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    documents = rows()
    held_out, training = documents[:QUERIES], documents[QUERIES:]
    write(folder / "docs.jsonl", [{"id": row["id"], "text": row["text"]} for row in documents])
    write(folder / "queries.jsonl", [{"id": f"q{n}", "text": row["query"]} for n, row in enumerate(held_out)])
    write(folder / "pairs.jsonl", [{"query": row["query"], "pos": row["text"]} for row in training])
    lines = [f"q{n}\t{row['id']}\t1\n" for n, row in enumerate(held_out)]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

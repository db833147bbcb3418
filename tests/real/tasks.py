"""Two retrieval tasks with honest qrels, made from Debian packages, the same bytes every time. BEIR folders in `.tasks`.

    folder = wn8k()         # 8,000 definitions of nouns in WordNet; a query is a noun, relevant are all its definitions
    folder = manzh()        # Chinese manual pages; a query is the short description of a page, relevant is its body
    python -m tests.real.tasks          # builds both, prints counts and checksums

No document and no query of qrels/test.tsv is in qrels/train.tsv. The files are pinned: a figure is of one task everywhere.

Licences: WordNet 3.0 is (C) 2006 Princeton University, free to use, copy, modify and distribute with its notice. manpages-zh
is GFDL 1.2+ for the most part, some pages are GPL-2 or GPL-2+. The package's file `copyright` has all of it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.real.troff import chinese_pages

PLACE = Path(__file__).parents[2] / ".tasks"
WN_DOCUMENTS = 8000
WN_WORDS = 7  # of a definition, at least

Texts = dict[str, str]  # by id
Relevant = dict[str, set[str]]  # the ids of documents by query text


@dataclass(frozen=True)
class Task:
    name: str
    package: str
    version: str
    deb: str  # sha256, of architecture `all`
    read: Callable[[Path], tuple[Texts, Relevant]]  # from the unpacked package
    test_share: int  # one in so many documents is in the test part
    files: dict[str, str]  # sha256 of what is built


def wn8k(folder: Path | None = None) -> Path:
    """The BEIR folder wn-8k in `folder` (default: `.tasks`), built where it is not there."""
    return _built(WN8K, folder or PLACE)


def manzh(folder: Path | None = None) -> Path:
    """The BEIR folder manzh in `folder` (default: `.tasks`), built where it is not there."""
    return _built(MANZH, folder or PLACE)


def missing(folder: Path | None = None) -> str | None:
    """Why the tasks are not in `folder` (default: `.tasks`) and cannot be built; None when all is well."""
    absent = [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]
    if not absent or not any(_wrong((folder or PLACE) / task.name, task) for task in TASKS):
        return None
    return f"no {' and no '.join(absent)} here: the tasks are made from Debian packages"


def texts(path: Path) -> Texts:
    with path.open(encoding="utf-8") as file:
        return {row["_id"]: row["text"] for row in map(json.loads, file)}


def qrels(folder: Path, part: str) -> list[tuple[str, str]]:
    """(query id, document id) of the part `train` or `test`; every score is 1."""
    rows = (line.split("\t") for line in (folder / f"qrels/{part}.tsv").read_text().splitlines()[1:])
    return [(query, document) for query, document, _ in rows]


def training_pairs(folder: Path) -> list[tuple[str, list[str]]]:
    """(query, the texts of all its relevant documents) of the train part."""
    corpus, queries = texts(folder / "corpus.jsonl"), texts(folder / "queries.jsonl")
    pairs: dict[str, list[str]] = {}
    for query, document in qrels(folder, "train"):
        pairs.setdefault(queries[query], []).append(corpus[document])
    return list(pairs.items())


def read_wordnet(root: Path) -> tuple[Texts, Relevant]:
    """Definitions of nouns without their usage examples; lemmas in lower case, as WordNet's index has them.

    Synsets with the same definition are one document; the shortest, which define little, are left out.
    """
    documents: dict[str, tuple[str, set[str]]] = {}  # by definition: the first synset that has it, the lemmas of all
    for line in (root / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition("|")
        offset, _, _, count, *words = head.split()
        definition = " ".join(gloss.split('"')[0].split()).rstrip(" ;:,")
        if len(definition.split()) >= WN_WORDS:
            _, known = documents.setdefault(definition, (f"n{offset}", set()))
            known.update(lemma.replace("_", " ").lower() for lemma in words[: 2 * int(count, 16) : 2])
    sample = sorted(documents.items(), key=lambda item: _sha256(f"sample {item[1][0]}".encode()))[:WN_DOCUMENTS]
    relevant: Relevant = {}
    for _, (synset, lemmas) in sample:
        for lemma in lemmas:
            relevant.setdefault(lemma, set()).add(synset)
    return {synset: definition for definition, (synset, _) in sample}, relevant


def read_manpages(root: Path) -> tuple[Texts, Relevant]:
    """Pages with the same body are one document with a query each; pages with the same description are all relevant to it."""
    names: Texts = {}  # by body
    relevant: Relevant = {}
    for name, description, body in chinese_pages(root / "usr/share/man/zh_CN"):
        relevant.setdefault(description, set()).add(names.setdefault(body, name))
    return {name: body for body, name in names.items()}, relevant


WN8K = Task(
    name="wn-8k",
    package="wordnet-base",
    version="1:3.0-37",
    deb="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    read=read_wordnet,
    test_share=8,
    files={
        "corpus.jsonl": "243e68591e9263a4e33159b8ae734e3bbd44d5917e704ec9e5468fcc645b0be0",
        "queries.jsonl": "80b113f36905b07196c1fb91d0e087c675145869141ba9b6cf1a05344971b2eb",
        "qrels/train.tsv": "3d1a4163d0e12e787610267c9463b0bbfef714484073eb08dde1bdfc745c9956",
        "qrels/test.tsv": "c3982bcdda2f94982a814312cd45f021925f730e58c25a7f397303bcf2186b3f",
    },
)
MANZH = Task(
    name="manzh",
    package="manpages-zh",
    version="1.6.4.0-1",
    deb="81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
    read=read_manpages,
    test_share=2,
    files={
        "corpus.jsonl": "7f0c3ad757fd32e8888e8957c1441926e5bec62ef549fe8809e99f8c3f955833",
        "queries.jsonl": "ef021d0db00df6dc4e7d0acc9e590569d705951d26fc225db356dab73c3a2613",
        "qrels/train.tsv": "6fac3c424cd9c4b0affcd0668510e1168a72b0176e82440c9bd740b20db21c46",
        "qrels/test.tsv": "ff6db6e1978bb7dc8f813a1b9091ec08cd95c264b500013ce72c5cd972525161",
    },
)
TASKS = (WN8K, MANZH)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _wrong(folder: Path, task: Task) -> dict[str, str]:
    """The files that are not what is pinned, with the sha256 that they have."""
    sums = {path: _sha256((folder / path).read_bytes()) for path in task.files if (folder / path).exists()}
    return {path: sums.get(path, "absent") for path, wanted in task.files.items() if sums.get(path) != wanted}


def _built(task: Task, place: Path) -> Path:
    """Built in a temporary folder that takes the name when it is right, so that nobody reads half a task."""
    built = place / task.name
    if not _wrong(built, task):
        return built
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".building-") as temporary:
        deb, fresh, unpacked = package(task), Path(temporary) / task.name, Path(temporary) / "unpacked"
        run_command("dpkg-deb", "-x", deb, unpacked).check_returncode()
        _write(task, unpacked, fresh)
        if wrong := _wrong(fresh, task):
            version = run_command("dpkg-deb", "-f", deb, "Version").stdout.strip()
            raise RuntimeError(
                f"{task.name} is made from {task.package} {task.version}; from {version}, found here, it comes out "
                f"otherwise: {wrong}. Get that version, or pin the new files in {__file__} and measure anew"
            )
        if _wrong(built, task):  # else another process was quicker
            shutil.rmtree(built, ignore_errors=True)
            fresh.rename(built)
    return built


def package(task: Task) -> Path:
    """The .deb, downloaded unless it is there; of another version where apt does not know the one wanted."""
    kept, wanted = PLACE / "packages" / f"{task.package}.deb", f"{task.package}={task.version}"
    if kept.exists() and _sha256(kept.read_bytes()) == task.deb:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    renewed = [["update"], ["download", wanted]] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
        for words in (["download", wanted], *renewed, ["download", task.package]):
            said = run_command("apt-get", "-qq", *words, cwd=temporary).stderr
            for deb in Path(temporary).glob("*.deb"):
                return deb.replace(kept)
    raise RuntimeError(f"apt-get cannot download {wanted}: {said[-500:]}")


def run_command(*command: str | Path, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def _write(task: Task, unpacked: Path, folder: Path) -> None:
    corpus, relevant = task.read(unpacked)
    ids = {query: f"q{number:05}" for number, query in enumerate(sorted(relevant))}
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", sorted(corpus.items())), ("queries", [(i, query) for query, i in ids.items()])):
        lines = [json.dumps({"_id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    test = _test_part(relevant, len(corpus) // task.test_share)
    for part, queries in (("train", relevant.keys() - test), ("test", test)):
        lines = [f"{ids[query]}\t{one}\t1\n" for query in sorted(queries) for one in sorted(relevant[query])]
        (folder / f"qrels/{part}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")
    shutil.copy(unpacked / f"usr/share/doc/{task.package}/copyright", folder / "copyright")
    note = f"{task.name}, made by tests/real/tasks.py from Debian's {task.package}.\n\n{__doc__[__doc__.index('Licences:') :]}"
    (folder / "README.md").write_text(note, encoding="utf-8")


def _test_part(relevant: Relevant, least: int) -> set[str]:
    """The queries of the test part: whole groups, in the order of their hashes, until these hold `least` documents.

    A group is the queries that share a document, directly or through others.
    """
    group: dict[str, set[str]] = {}  # by document
    for query, documents in relevant.items():
        tied = {query}.union(*(group.get(document, ()) for document in documents))
        group.update((document, tied) for one in tied for document in relevant[one])
    groups = {_sha256(f"part {min(tied)}".encode()): tied for tied in group.values()}
    test, held = set[str](), set[str]()
    for key in sorted(groups):
        if len(held) < least:
            test |= groups[key]
            held.update(*(relevant[query] for query in groups[key]))
    return test


def main() -> None:
    for task in TASKS:
        folder = _built(task, PLACE)
        print(f"{folder}: {len(texts(folder / 'corpus.jsonl')):,} documents")
        for part in ("train", "test"):
            pairs = qrels(folder, part)
            print(f"  {part}: {len({query for query, _ in pairs}):,} queries, {len(pairs):,} qrels")
        print("\n".join(f"  {checksum}  {name}" for name, checksum in task.files.items()))


if __name__ == "__main__":
    main()

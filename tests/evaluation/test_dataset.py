"""Datasets: BEIR folders, copies of Hugging Face datasets, three URLs; and the refusal of wrong ones."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import InputError, UsageError
from lib.evaluation.dataset import Dataset
from lib.evaluation.dataset import read_dataset as read_unchecked
from lib.evaluation.dataset_checks import with_notes
from lib.evaluation.dataset_layouts import TableUrls, locate, tables_of
from lib.evaluation.tasks import find
from lib.storage.folder import Folder

CORPUS = [{"_id": "p1", "title": "fish", "text": "swim"}, {"_id": "p2", "title": "", "text": "birds fly"}]
CORPUS += [{"_id": f"p{i}", "title": "t", "text": f"text {i}"} for i in range(3, 9)]
QUERIES = [
    {"_id": "q1", "text": "who swims"},
    {"_id": "q2", "text": "who flies"},
    {"_id": "q3", "text": "nobody asked"},
]
QRELS = [("q1", "p1", 2), ("q1", "p3", 0), ("q2", "p2", 1)]
JUDGED = {"q1": {"p1": 2, "p3": 0}, "q2": {"p2": 1}}


def read_dataset(tables: TableUrls, split: str, template: str | None, folder: Folder) -> Dataset:
    return with_notes(read_unchecked(tables, split, template, folder), folder)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_tsv(path, rows, header="query-id\tcorpus-id\tscore"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")


def named(*names):
    return [dict(zip(names, row, strict=True)) for row in QRELS]


def beir(folder):
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "queries.jsonl", QUERIES)
    write_tsv(folder / "qrels" / "test.tsv", QRELS)
    write_tsv(folder / "qrels" / "train.tsv", [("q3", "p4", 1)])


def beir_compressed(folder):
    beir(folder)
    (folder / "corpus.jsonl").unlink()
    write_jsonl(folder / "corpus.jsonl.gz", CORPUS)


def mteb(folder):
    """The layout of push_to_hub, without a README; a split may have several files."""
    write_parquet(folder / "corpus" / "test-00000-of-00002.parquet", CORPUS[:3])
    write_parquet(folder / "corpus" / "test-00001-of-00002.parquet", CORPUS[3:])
    write_parquet(folder / "queries" / "test-00000-of-00001.parquet", QUERIES)
    write_parquet(folder / "qrels" / "test-00000-of-00001.parquet", named("query-id", "corpus-id", "score"))
    write_parquet(folder / "qrels" / "dev-00000-of-00001.parquet", named("query-id", "corpus-id", "score")[:1])


def mteb_by_readme(folder):
    """Files that only the README assigns to the tables."""
    write_jsonl(folder / "a.jsonl", CORPUS)
    write_jsonl(folder / "b.jsonl", QUERIES)
    write_jsonl(folder / "c" / "d.jsonl", named("query-id", "corpus-id", "score"))
    configs = [("corpus", "corpus", "a.jsonl"), ("queries", "queries", "b.jsonl"), ("default", "test", "c/*.jsonl")]
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}" for name, split, path in configs
    ]
    (folder / "README.md").write_text("---\nlanguage: zh\nconfigs:\n" + "\n".join(lines) + "\n---\n# A card\n")


def first_form(folder):
    """C-MTEB's first repositories: numeric ids, qrels in a repository of their own."""
    corpus = [{"id": row["_id"], "text": f"{row['title']} {row['text']}".strip()} for row in CORPUS]
    write_parquet(folder / "data" / "corpus-00000-of-00001-abc.parquet", corpus)
    queries = [{"id": row["_id"], "text": row["text"]} for row in QUERIES]
    write_parquet(folder / "data" / "queries-00000-of-00001-abc.parquet", queries)
    beside = folder.with_name(folder.name + "-qrels")
    write_parquet(beside / "data" / "test-00000-of-00001-abc.parquet", named("qid", "pid", "score"))


@pytest.mark.parametrize("write", [beir, beir_compressed, mteb, mteb_by_readme, first_form])
def test_every_layout_gives_the_same_dataset(tmp_path, write):
    """Every layout gives the judged queries, the qrels with their grades, and the place of the passages."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    dataset = read_dataset(tables_of(str(folder), "test", {}), "test", None, Folder(str(tmp_path / "stages")))

    assert dataset.qrels == JUDGED
    assert dataset.queries.to_pylist() == [{"id": "q1", "text": "who swims"}, {"id": "q2", "text": "who flies"}]
    assert (dataset.candidates, dataset.notes) == (None, ())
    titled = write is not first_form
    assert dataset.passages.template == ("{title} {text}" if titled else "{text}")
    assert dataset.passages.id_column == ("_id" if titled else "id")


def test_candidates_come_as_lists_or_as_pairs(tmp_path):
    """mteb's top_ranked has a list a query, an own file a pair a row: both give the candidates of judged queries, each once."""
    mteb(tmp_path)
    lists = [{"query-id": "q1", "corpus-ids": ["p1", "p4", "p4"]}, {"query-id": "q3", "corpus-ids": ["p1"]}]
    write_parquet(tmp_path / "top_ranked" / "test-00000-of-00001.parquet", lists)
    tables = tables_of(str(tmp_path), "test", {})
    write_tsv(tmp_path / "pairs.tsv", [("q1", "p1"), ("q1", "p4"), ("q3", "p1")], "query-id\tcorpus-id")
    pairs = TableUrls(tables.judgments, tables.corpus, tables.queries, str(tmp_path / "pairs.tsv"))

    for each in (tables, pairs):
        dataset = read_dataset(each, "test", None, Folder(str(tmp_path / "stages")))
        assert dataset.candidates.to_pylist() == [{"query_id": "q1", "passage_id": p} for p in ("p1", "p4")]
        assert dataset.notes == ("1 queries have no candidates; each scores 0 (q2)",)


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_lists_of_positives_and_negatives_become_candidates(tmp_path, write):
    """C-MTEB's first reranking form gives a passage for each text, with mteb's ids; rows that lack a side are left out and
    counted."""
    rows = [
        {"query": "one", "positive": ["a", "b"], "negative": ["c"]},
        {"query": "two", "positive": [], "negative": ["c"]},
        {"query": "three", "positive": ["d"], "negative": ["e", "f"]},
    ]
    write(tmp_path / "data" / f"dev.{'parquet' if write is write_parquet else 'jsonl'}", rows)
    stages = Folder(str(tmp_path / "stages"))
    dataset = read_dataset(tables_of(str(tmp_path), "dev", {}), "dev", None, stages)

    assert dataset.queries["text"].to_pylist() == ["one", "three"]
    assert dataset.qrels["dev_query1"] == {
        "apositive_dev_query1_00000": 1,
        "negative_dev_query1_00000": 0,
        "negative_dev_query1_00001": 0,
    }
    passages = pq.read_table(dataset.passages.url).to_pylist()
    assert [row["text"] for row in passages] == ["a", "b", "c", "d", "e", "f"]
    assert len(dataset.candidates) == 6
    assert dataset.notes == ("1 rows without a positive or without a negative are left out, as mteb does",)


def test_a_text_that_looks_like_a_list_is_a_text(tmp_path):
    """A single positive needs no list, and may begin with a bracket; a null in a list is refused."""
    write_jsonl(tmp_path / "data" / "dev.jsonl", [{"query": "q", "positive": "[a] b", "negative": ["c", "[1]"]}])
    tables, stages = tables_of(str(tmp_path), "dev", {}), Folder(str(tmp_path / "stages"))
    dataset = read_dataset(tables, "dev", None, stages)
    assert pq.read_table(dataset.passages.url)["text"].to_pylist() == ["[a] b", "c", "[1]"]

    write_jsonl(tmp_path / "data" / "dev.jsonl", [{"query": "q", "positive": ["a", None], "negative": ["c"]}])
    with pytest.raises(InputError, match="a null in a list"):
        read_dataset(tables, "dev", None, Folder(str(tmp_path / "other")))


def test_a_split_is_not_the_beginning_of_another(tmp_path):
    """`test` means test.tsv, or its numbered parts; test-hard.tsv and test.small.tsv are other splits."""
    beir(tmp_path)
    write_tsv(tmp_path / "qrels" / "test-hard.tsv", [("q3", "p1", 1)])
    write_tsv(tmp_path / "qrels" / "test.small.tsv", [("q3", "p1", 1)])
    assert tables_of(str(tmp_path), "test", {}).judgments == f"{tmp_path}/qrels/test.tsv"
    assert tables_of(str(tmp_path), "test-hard", {}).judgments == f"{tmp_path}/qrels/test-hard.tsv"


def test_two_files_of_one_table_are_refused(tmp_path):
    """corpus.jsonl beside corpus.parquet, a copy in another format, is ambiguous."""
    beir(tmp_path)
    write_parquet(tmp_path / "corpus.parquet", CORPUS)
    with pytest.raises(InputError, match=r"has corpus.jsonl and corpus.parquet, and only one can be meant"):
        tables_of(str(tmp_path), "test", {})


def test_rows_that_cannot_be_read_have_no_id_to_miss(tmp_path):
    """A broken line of the corpus counts neither as a duplicate nor as a missing id: the embed job keeps it, with its reason."""
    beir(tmp_path)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("{broken\n{broken\n")
    dataset = read_dataset(tables_of(str(tmp_path), "test", {}), "test", None, Folder(str(tmp_path / "stages")))
    assert dataset.notes == ()


def test_the_ids_of_a_corpus_are_read_once(tmp_path, monkeypatch):
    """Notes on the data are stored beside its stages; the next evaluation does not read the corpus for them."""
    damaged(tmp_path, qrels=[*QRELS, ("q1", "gone", 1)])
    tables, stages = tables_of(str(tmp_path), "test", {}), Folder(str(tmp_path / "stages"))
    first = read_dataset(tables, "test", None, stages)
    monkeypatch.setattr("lib.evaluation.dataset_checks._known_ids", None)
    assert read_dataset(tables, "test", None, stages).notes == first.notes != ()


def damaged(folder, **changes):
    beir(folder)
    for name, rows in changes.items():
        if name == "qrels":
            write_tsv(folder / "qrels" / "test.tsv", rows)
        else:
            write_jsonl(folder / f"{name}.jsonl", rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": [*CORPUS, CORPUS[2]]}, r"1 passage ids come more than once in .*corpus.jsonl: 'p3'"),
        ({"queries": [*QUERIES, QUERIES[0]]}, "1 query ids come more than once in the queries: 'q1'"),
        ({"qrels": [*QRELS, ("q1", "p1", 1)]}, "query 'q1' and passage 'p1' have the grades 2 and 1"),
        ({"qrels": [("q1", "p1", "good")]}, "a score is not a number.*Write whole numbers"),
        ({"qrels": [("q1", "p1", "0.5")]}, r"test.tsv#0: the score 0.5 is not a whole number"),
        ({"qrels": [*QRELS, ("q1",)]}, "fields where the header has 3"),
        (
            {"corpus": [*CORPUS, {"text": "who am I"}]},
            r"1 rows of .*corpus.jsonl have no '_id', the first is corpus.jsonl#",
        ),
        ({"queries": [*QUERIES, {"text": "who am I"}]}, r"1 rows of .*queries.jsonl have no '_id'"),
        ({"qrels": [("q1", "nothing", 1)]}, "none of the 1 judged passages is in .*corpus.jsonl, among them 'nothing'"),
        ({"qrels": [("who", "p1", 1)]}, "none of the 1 judged queries is in .*queries.jsonl, among them 'who'"),
        ({"qrels": []}, "qrels.*has no rows"),
        (
            {"corpus": [{"name": "p1", "text": "x"}]},
            "no column with the passage's id in .*corpus.jsonl.*there are name",
        ),
        ({"queries": [{"_id": "q1", "body": "x"}]}, "no column with the query's text in .*queries.jsonl"),
    ],
)
def test_data_that_cannot_be_scored_is_refused(tmp_path, changes, message):
    """Repeated ids, judgments of unknown ids and missing columns are refused, each with its name."""
    damaged(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        read_dataset(tables_of(str(tmp_path), "test", {}), "test", None, Folder(str(tmp_path / "stages")))


def test_irregular_rows_are_counted_and_named(tmp_path):
    """Judged passages that the corpus lacks, judged queries without a text or without a relevant passage, and repeated judgments
    are kept, counted and named."""
    qrels = [*QRELS, QRELS[0], ("q1", "gone", 1), ("q4", "p1", 1), ("q5", "p2", 0), ("q6", "p1", 1)]
    queries = [*QUERIES, {"_id": "q5", "text": "x"}, {"_id": "q6", "text": "  "}]
    damaged(tmp_path, qrels=qrels, queries=queries)
    dataset = read_dataset(tables_of(str(tmp_path), "test", {}), "test", None, Folder(str(tmp_path / "stages")))

    assert dataset.notes == (
        "1 judgments come more than once, with one grade (q1 p1)",
        "1 judged passages are not in the corpus; they count as never found (gone)",
        "1 judged queries have no text; each scores 0 (q4)",
        "1 queries are empty; each scores 0 (q6)",
        "1 queries have no relevant passage; each scores 0 (q5)",
    )
    assert len(dataset.qrels) == 5


def test_a_missing_split_is_refused_with_the_existing_ones(tmp_path):
    """The refusal names the splits of the folder, or of the folder of qrels beside it; without any qrels it names the searched
    places."""
    for name, write, splits in (("a", beir, "test, train"), ("b", mteb, "dev, test"), ("c", first_form, "test")):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        with pytest.raises(
            UsageError, match=f"no split 'validation' in .*Splits there: {splits}. Choose one with --split"
        ):
            tables_of(str(tmp_path / name), "validation", {})
    shutil.rmtree(tmp_path / "a" / "qrels")
    with pytest.raises(InputError, match=r"no qrels in .*qrels/test\.tsv"):
        tables_of(str(tmp_path / "a"), "test", {})
    for nothing in ("nowhere", "a/corpus.jsonl"):
        with pytest.raises(InputError, match=rf"no dataset at .*{nothing}"):
            tables_of(str(tmp_path / nothing), "test", {})
    (tmp_path / "b" / "README.md").write_text("---\nconfigs:\n- corpus\n---\n")  # a README without tables is ignored
    assert tables_of(str(tmp_path / "b"), "test", {}).corpus
    (tmp_path / "b" / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(InputError, match="its head is not YAML"):
        tables_of(str(tmp_path / "b"), "test", {})


def test_a_task_is_located_by_its_name(tmp_path):
    """--dataset names the folder itself, or a folder with it under the task's or the hub's name; without --dataset and without a
    hub the error has the command that fetches it."""
    task = find("T2Retrieval")
    (tmp_path / "T2Retrieval").mkdir()
    beir(tmp_path / "T2Retrieval")
    assert locate(task, str(tmp_path), False, {}) == f"{tmp_path}/T2Retrieval"
    assert locate(task, f"{tmp_path}/T2Retrieval", True, {}) == f"{tmp_path}/T2Retrieval"
    with pytest.raises(InputError, match=r"no data of T2Retrieval in .*looked for"):
        locate(task, f"{tmp_path}/T2Retrieval", False, {})  # one folder is not the data of several tasks
    (tmp_path / "mteb").mkdir()
    beir(tmp_path / "mteb" / "DuRetrieval")
    assert locate(find("DuRetrieval"), str(tmp_path), True, {}) == f"{tmp_path}/mteb/DuRetrieval"
    with pytest.raises(InputError, match="hf download mteb/T2Retrieval --repo-type dataset --revision cf778c0"):
        locate(task, None, True, {})

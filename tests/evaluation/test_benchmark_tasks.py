"""The retrieval tasks of the benchmarks: the same bytes on every machine, with consistent qrels."""

import re
from dataclasses import replace

import pytest

from tests.real.tasks import MANZH, TASKS, WN8K, WN_WORDS, manzh, missing, qrels, texts, training_pairs, wn8k
from tests.real.troff import sections

BUILDERS = {WN8K.name: wn8k, MANZH.name: manzh}
PAGE = r"""
.\" A comment
.de Vb \" a definition
.nf
..
.ie n \{\
.    ds L" ""
.\}
.el .ds L" ``
.TH OPEN 2 1999-06-03 "Linux" "System calls"
.SH NAME
open, creat \- 打开和/或创建\fB一个\fP文件
.SH "描述 (DESCRIPTION)"
.BR open (2)
将\*(L"路径名\*(R"转换为
一个 \s-1O_RDWR\s0 描述符
.TP
\fB\-a\fR, \fB\-\-all\fR
全部\(bu
.IP "最后 一项" 4
.nf
    int a;
    a \e n;
.fi
.Op Fl p Ar num
"""


@pytest.fixture(params=BUILDERS)
def task(request):
    """The folder of each task in turn."""
    if reason := missing():
        pytest.skip(reason)
    return BUILDERS[request.param]()


@pytest.mark.parametrize("kind", TASKS, ids=lambda kind: kind.name)
def test_built_twice_it_is_the_same(kind, tmp_path):
    """Two builds give the same bytes, and the files have the checksums that are pinned: figures compare across machines."""
    if reason := missing(tmp_path):
        pytest.skip(reason)
    first, second = (BUILDERS[kind.name](tmp_path / name) for name in ("first", "second"))
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}

    assert {str(path) for path in files} == {*kind.files, "README.md", "copyright"}
    assert all((second / path).read_bytes() == data for path, data in files.items())
    assert not list(tmp_path.rglob(".building-*"))


def test_a_changed_folder_is_built_again(tmp_path):
    """A folder with a file that is not as pinned is not used; it is replaced by the right one."""
    if reason := missing(tmp_path):
        pytest.skip(reason)
    qrels_file = manzh(tmp_path) / "qrels" / "test.tsv"
    right = qrels_file.read_bytes()
    qrels_file.write_bytes(right[:-10])

    assert manzh(tmp_path) / "qrels" / "test.tsv" == qrels_file
    assert qrels_file.read_bytes() == right


def test_another_package_version_is_named(tmp_path, monkeypatch):
    """A build that differs from the pinned one is refused, with the pinned version, the installed one, and the files that differ."""
    if reason := missing(tmp_path):
        pytest.skip(reason)
    pinned = replace(MANZH, version="9.9-1", files=MANZH.files | {"qrels/test.tsv": "0" * 64})
    monkeypatch.setattr("tests.real.tasks.MANZH", pinned)

    with pytest.raises(RuntimeError, match=rf"manpages-zh 9\.9-1; from {re.escape(MANZH.version)}, .*qrels/test\.tsv"):
        manzh(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_train_and_test_share_nothing(task):
    """No document and no query, by id or by text, is in both parts; both parts have some."""
    corpus, queries = texts(task / "corpus.jsonl"), texts(task / "queries.jsonl")
    (train, train_documents), (test, test_documents) = (
        ({queries[query] for query, _ in pairs}, {corpus[document] for _, document in pairs})
        for pairs in (qrels(task, "train"), qrels(task, "test"))
    )

    assert train
    assert test
    assert not train & test
    assert not train_documents & test_documents
    assert len(set(queries.values())) == len(queries)
    assert len(set(corpus.values())) == len(corpus)


def test_qrels_name_known_ids(task):
    """Every id of the qrels is in corpus or queries, every query is in a part, no pair is there twice."""
    corpus, queries = texts(task / "corpus.jsonl"), texts(task / "queries.jsonl")
    pairs = qrels(task, "train") + qrels(task, "test")

    assert {query for query, _ in pairs} == queries.keys()
    assert {document for _, document in pairs} <= corpus.keys()
    assert len(set(pairs)) == len(pairs)


def test_definitions_define():
    """Every document of wn-8k is a definition of WN_WORDS words or more, without the usage examples that follow it."""
    if reason := missing():
        pytest.skip(reason)
    corpus = texts(wn8k() / "corpus.jsonl")

    assert len(corpus) == 8000
    assert all(len(text.split()) >= WN_WORDS and '"' not in text for text in corpus.values())


def test_a_page_becomes_plain_text():
    """Sections with heading and text: no comment, definition, conditional, request or escape; Chinese lines join tightly."""
    assert sections(PAGE) == [
        ("", ""),
        ("NAME", "open, creat - 打开和/或创建一个文件"),
        (
            "描述 (DESCRIPTION)",
            'open(2) 将"路径名"转换为一个 O_RDWR 描述符\n-a, --all 全部•\n最后 一项\nint a;\na \\ n;\n-p num',
        ),
    ]


def test_manual_pages_are_plain_text():
    """No page has lines that look like requests, but the two that tell of them; each query has Chinese."""
    if reason := missing():
        pytest.skip(reason)
    folder = manzh()
    corpus, queries = texts(folder / "corpus.jsonl"), texts(folder / "queries.jsonl")
    request = re.compile(r"^[.'](SH|TP|PP|B|I|BR|IP|br|sp|nf|fi)\b", re.M)

    assert {page for page, text in corpus.items() if request.search(text)} == {"man.7", "suffix.7"}
    assert all(re.search("[\u4e00-\u9fff]", query) for query in queries.values())


def test_training_pairs_have_all_relevant_texts(task):
    """`training_pairs` gives each train query once, with the text of every document relevant to it."""
    pairs = training_pairs(task)

    assert len({query for query, _ in pairs}) == len(pairs)
    assert sum(len(documents) for _, documents in pairs) == len(qrels(task, "train"))

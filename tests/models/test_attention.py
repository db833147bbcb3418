"""Packed attention: its gradients, what it refuses, and the self-test at load that finds it out when it is wrong."""

from typing import Any

import pytest
import torch

from lib.errors import ModelError
from lib.models import attention, encoder
from lib.models.encoder import Encoder
from lib.models.spec_reader import read_spec
from lib.models.tokenizer import Tokenizer
from tests.support.reference import TEXTS, assert_close, reference


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen2-window"])
def test_gradients_of_packed_attention_equal_those_of_texts_alone(kind: str, build: Any) -> None:
    """Training runs through the same function: gradients of a packed batch equal those of its texts one by one."""
    from lib.models.forward import flatten, run_equal_length, run_packed
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
                run_equal_length(network, batch.part(i, i + 1)).pow(2).sum().backward()
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


def test_the_kernel_is_called_as_torch_has_it() -> None:
    """The operator of the flash kernel takes what it is given: on tensors without data, where there is no GPU."""
    query, key = (torch.empty(1, heads, 10, 64, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    layout = attention.Layout(torch.tensor([0, 4, 10], dtype=torch.int32, device="meta"), 6, ())
    output = attention._flash_attention(query, key, key, layout, None, is_causal=True, reach=3, dropout=0.1)

    assert output.shape == (10, 4, 64)


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
